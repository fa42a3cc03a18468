"""The table of docs/methods.md: every class of distill/methods, what it takes, what it costs and what is shown of it.

make tables    writes that table

A new method is found by itself; test_trainer.py runs it, too. It needs a first docstring line "NAME: title.
Authors year, arXiv XXXX.XXXXX.", a line in zoo.py where it cannot do without an argument, and on each test that
proves it a marker: @pytest.mark.level(1, "SiD") for a closed form, 2 for a toy problem, 4 for the authors' own numbers,
5 for a figure that was published, "S" for the law of its samples under the scheduler of every family. Level 3 are the
digits: a row in docs/digits.json that has not collapsed.
"""

import ast
import inspect
import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from zoo import CLASSES, example

from benchmarks.results import METHODS, REFERENCE, TEACHERS, collapsed
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import VP
from distill.method import Requirement
from distill.training.build import build
from distill.training.config import StudentConfig
from pipelines.families import edm, sd
from pipelines.planning import flop_counter
from recipes.digits import TABLE

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
FIRST, LAST = "<!-- what tests/test_methods.py found -->\n", "<!-- end -->"


def marked():
    """{(level, method): its tests}, of the markers in the source; ValueError names one on a test that does not run."""
    found = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            for mark in node.decorator_list:
                if not (isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.level"):
                    continue
                level, *names = (ast.literal_eval(arg) for arg in mark.args)
                where = f"{file.relative_to(ROOT)}::{node.name}"
                if any(re.match(r"pytest\.mark\.(skip|skipif|xfail)\b", m) for m in marks):
                    raise ValueError(f"{where} is said to prove level {level} of {', '.join(names)}, but is skipped")
                if not node.name.lower().startswith("test"):
                    raise ValueError(f"{where} is no test")
                for name in names:
                    found.setdefault((level, name), []).append(where)
    return found


def of_digits():
    """The classes whose students of the digits did not collapse."""
    rows = json.loads((ROOT / "docs" / "digits.json").read_text())["rows"]
    (teacher,) = (row for row in rows if row["model"] == "teacher" and row["steps"] == TEACHERS[REFERENCE])
    names = {row["model"] for row in rows if row["model"] != "teacher" and not collapsed(row, teacher)}
    return {type(TABLE[name].config.method).__name__ for name in names}


def without(method):
    """The method without its GAN, if it has one and can do without."""
    try:
        return replace(method, **{f.name: 0.0 for f in fields(method) if f.name in ("gan", "gan_fake")})
    except ValueError:
        return method


def passes(method):
    """Forward passes of an iteration, a one-step student of the digits' teacher; of a small SD where text is heard."""
    if {Requirement.NEGATIVE_ADAPTER, Requirement.CROSS_ATTENTION} & {*method.requirements}:
        c = {"prompt_embeds": torch.zeros(1, 77, 32)}
        teacher, shape = Denoiser(sd.unet(), VP.scaled_linear(), "eps", sd.call, null=c), (4, 8, 8)
    else:
        digits = edm.teacher(edm.unet((16, 32)), 0.75, null_class=10)
        teacher, shape, c = digits.denoiser, digits.shape, digits.encode([0])
    teacher.net.to("meta")
    c = {name: value.to("meta") for name, value in c.items()}
    student = StudentConfig(
        1 + (Requirement.SEVERAL_CALLS in method.requirements),
        negative=77 if Requirement.NEGATIVE_ADAPTER in method.requirements else 0,
    )
    return flop_counter.passes(method, build(method, teacher, shape, c, student), c)


def row(name, levels):
    cls, default = CLASSES[name], example(name)
    module = inspect.getmodule(cls)
    title, _, paper = module.__doc__.partition("\n")[0].partition(": ")
    paper = re.sub(r"(?:arXiv )?(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", paper.rstrip("."))
    what = inspect.getdoc(cls).partition("\n")[0].rstrip(".")
    said = lambda m: ", ".join(one.value for one in m.requirements) or "nothing but conditions"
    bare, around = without(default), getattr(default, "base", None)
    needs, cost = said(default), f"{passes(default):.1f}"
    cost += f" around {type(around).__name__}" if around else ""
    if bare != default:
        needs += f"; {said(bare)} without its GAN" if bare.requirements != default.requirements else ""
        cost += f"; {passes(bare):.1f} without its GAN"
    roles = ", ".join(("student", *default.roles))
    file = module.__name__.replace(".", "/") + ".py"
    return f"| {title} | [{name}](../{file}) | {paper} | {what} | {roles} | {needs} | {cost} | {levels} |"


def test_the_page_says_what_is_there():
    found, digits = marked(), of_digits()
    unknown = {name for _, name in found} - CLASSES.keys()
    assert not unknown, f"a marker names {unknown}, which distill.methods does not export"
    head = ("method", "class", "paper", "what it is", "trained", "needs", "passes", "shown")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in sorted(CLASSES, key=str.lower):
        levels = {level for level, method in found if method == name} | ({3} if name in digits else set())
        rows.append(row(name, " ".join(sorted(map(str, levels or {0})))))
    table = "\n".join(rows) + "\n"
    text = PAGE.read_text()
    head, _, rest = text.partition(FIRST)
    written, _, tail = rest.partition(LAST)
    if os.environ.get("DISTILL_WRITE"):
        PAGE.write_text(head + FIRST + table + LAST + tail)
    else:
        assert written == table, "make tables writes it"


def test_a_pass_is_one_forward_two_backward():
    """Denoise: one forward and one backward pass of the student, but for the gradient of the first layer's input."""
    assert passes(CLASSES["Denoise"]()) == pytest.approx(3, abs=0.05)


def test_the_document_of_the_digits_says_when_to_choose_each():
    """docs/digits.md quotes the table."""
    text = (ROOT / "docs" / "digits.md").read_text()
    for name in METHODS:
        assert TABLE[name].advice.startswith("Choose it ") and f"- **{name}**: {TABLE[name].advice}\n" in text, name
