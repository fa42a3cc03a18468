"""A wrong value of any field of any recipe ends in one message that names the field, before any work; a legal one runs.

The fields are found by walking the recipes' configurations, so a new recipe or field is covered from its birth.
"""

import importlib
import io
import math
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import MISSING, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin
from unittest.mock import patch

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.configuration import dump, parse
from distill.diffusion.times import TimeDistribution
from distill.ranges import Range, iterate_fields
from pipelines import run

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [p for p in sorted((ROOT / "recipes").glob("*.py")) if "\nCONFIG = Config(" in p.read_text()]
RECIPES = {p.stem: importlib.import_module(f"recipes.{p.stem}").CONFIG for p in SOURCES}
LEAVES = [(r, *field) for r, config in RECIPES.items() for field in iterate_fields(config)]
ALL = {(r, name.removeprefix("train.")): leaf for r, name, *leaf in LEAVES}
ALL = {key: leaf for key, leaf in ALL.items() if TimeDistribution not in get_args(leaf[0])}  # a law or None has no flag
ONCE = {f"{r} {name}": (r, name) for (r, name), leaf in {id(leaf[1]): (k, leaf) for k, leaf in ALL.items()}.values()}
TIED = (
    "low",
    "high",
    "N",
    "sigma",
    "timestep",
    "times",
    "n_0",
    "n_1",
    "q",
    "phases",
    "c",
    "student.lora.rank",
    "student.negative",
)  # legal with some values of other fields only
WORDS = st.text("abcdefghij XYZ.:", min_size=1, max_size=9).filter(lambda s: s.strip() == s and s != "inf")
FEW = settings(max_examples=2, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=300)
WAYS = ("flags", "as a flag", "file")


# ---- values ----


def members(hint):
    """The types of a union, or the type itself, each with its Annotated taken off where that is no Range."""
    if get_origin(hint) is Annotated and not isinstance(get_args(hint)[1], Range):
        hint = get_args(hint)[0]
    return get_args(hint) if get_origin(hint) not in (Annotated, Literal, tuple, None) else (hint,)


def outside(range):
    """What is no number of a Range, as words of a command line."""
    edges = [range.low] if range.ends[0] == "(" else []
    edges += [range.high] if range.ends[1] == ")" else []
    edges += [e for e in (range.low - 1, range.low - 10**30, range.high + 1, range.high + 10**30) if math.isfinite(e)]
    if range.kind is int:
        return st.sampled_from([f"{10**400}", *map(str, edges), f"{10**30}", "nan", "1.5", "1e3"]) | WORDS
    return st.sampled_from([*map(str, edges), "nan", "inf", "-inf", "1e400"]) | WORDS


def inside(range):
    low, high = max(range.low, -1e30), min(range.high, 1e30)
    if range.kind is int:
        return st.integers(int(low), int(high)) | st.sampled_from([int(low), int(high)])
    ends = {"exclude_min": range.ends[0] == "(", "exclude_max": range.ends[1] == ")"}
    return st.floats(low, high, allow_subnormal=False, **{k: v for k, v in ends.items() if v})


def strings(default):
    """What no string may be: not printable, too long for a name on disk, empty where that means nothing."""
    empty = [] if default == "" else [""]
    return st.sampled_from(
        ["a\nb", "\x1b[31mred", "a\tb", "x" * 300, "runs/" + "y" * 256, "d/" * 2500, "\u202ereversed", *empty]
    )


def wrong(hint, default):
    """Lists of words that no value of a type has."""
    kinds = members(hint)
    if bool in kinds:
        return st.lists(WORDS, min_size=1, max_size=2)
    found = []
    for kind in kinds:
        if get_origin(kind) is Annotated:
            one = outside(get_args(kind)[1])
            found += [one.map(lambda w: [w])]
        elif get_origin(kind) is Literal:
            found += [WORDS.filter(lambda w, kind=kind: w not in get_args(kind)).map(lambda w: [w])]
        elif kind is str:
            found += [strings(default).map(lambda w: [w])]
        elif get_origin(kind) is tuple:
            item, n = get_args(kind)[0], len(get_args(kind))
            bad = WORDS if get_origin(item) is Literal else strings(None) if item is str else None
            bad = outside(get_args(item)[1]) if bad is None else bad
            good = "a" if item is str else "0.5"
            if get_args(kind)[-1] is ...:
                found += [bad.map(lambda w, good=good: [good, w])]
                found += [st.just([])] if default not in ((), None) else []
            else:
                found += [bad.map(lambda w, n=n: [*["0.5"] * (n - 1), w]), st.just(["0.5"] * (n + 1)), st.just([])]
    return st.one_of(found)


def wrong_in_a_file(hint):
    """What only a file can say: null, a list or a table for a value, other things for true and false."""
    kinds = members(hint)
    bad = [] if NoneType in kinds else [None]
    bad += [3, "true", [True]] if bool in kinds else [True, {"a": 1}, [["a"]], [None, 1], ["--smoke"]]
    return st.sampled_from(bad if any(get_origin(k) is tuple for k in kinds) or bool in kinds else [*bad, [1, 2], []])


# ---- runs ----


def called(recipe, argv):
    """(config or None, what was said): a recipe's main up to where work would begin."""
    ran, said = [], io.StringIO()
    begin = lambda config, *_: ran.append(config)
    with patch.object(run, "validate_run"), patch.object(run, "folder_lock", nullcontext):
        with patch.object(run, "run", begin), redirect_stderr(said), redirect_stdout(said):
            try:
                run.main(RECIPES[recipe], argv)
            except SystemExit as end:
                assert end.code == 2 and not ran, said.getvalue()
    return (ran or [None])[0], "".join(c for c in said.getvalue() if c.isascii() and not c.isspace())


def refused(recipe, name, argv):
    config, said = called(recipe, argv)
    assert config is None and "Traceback" not in said, (argv, said)
    part, _, last = name.rpartition(".")
    whole = f"{name}is" in said or f"--{name}" in said
    assert whole or (f"Errorparsing{part}:" in said and last in said), (name, argv, said)


def filed(folder, name, value):
    """The flags that read a file which says nothing but this."""
    for key in reversed(name.split(".")):
        value = {key: value}
    (folder / "config.yaml").write_text(yaml.safe_dump(value))
    return ["--config", f"{folder / 'config.yaml'}"]


def try_wrong(data, recipe, name, folder, ways=WAYS):
    hint, field, _ = ALL[recipe, name]
    default = None if field.default is MISSING else field.default
    way, words = data.draw(st.sampled_from(ways)), data.draw(wrong(hint, default))
    if way == "flags":
        return refused(recipe, name, [f"--{name}", *words])
    value = data.draw(wrong_in_a_file(hint)) if way == "file" else words[0] if len(words) == 1 else words
    refused(recipe, name, filed(folder, name, value))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("file")


@pytest.mark.parametrize("field", ONCE)
@FEW
@given(st.data())
def test_wrong_values(field, folder, data):
    """On the command line, and in a file: the first example takes another of the ways with each field."""
    first = list(ONCE).index(field) % len(WAYS)
    try_wrong(data, *ONCE[field], folder, WAYS[first:] + WAYS[:first])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_wrong_values_of_every_recipe(recipe, folder):
    @MANY
    @given(st.data(), st.sampled_from([name for r, name in ALL if r == recipe]))
    def tried(data, name):
        try_wrong(data, recipe, name, folder)

    tried()


@pytest.mark.parametrize("recipe", RECIPES)
@FEW
@given(st.data())
def test_legal_values(recipe, data):
    """Huge and small ones too; all numbers at once, as flags and from a file."""
    values = {}
    tied = (*TIED, "student.steps") if RECIPES[recipe].student.times else TIED  # as many as the times
    for (r, name), (hint, _, _) in ALL.items():
        ranges = [get_args(kind)[1] for kind in members(hint) if get_origin(kind) is Annotated]
        if r == recipe and ranges and name.split(".")[-1] not in tied and name not in tied:
            values[name] = data.draw(inside(ranges[0]), name)
    argv = [word for name, value in values.items() for word in (f"--{name}", repr(value))]
    config, said = called(recipe, argv)
    assert config is not None, said
    got = {name.removeprefix("train."): value for name, *_, value in iterate_fields(config)}
    assert {name: got[name] for name in values} == values


# ---- the walk ----


def test_every_number_has_a_range():
    assert len(RECIPES) > 15 and len(ONCE) > 80
    assert not [key for key, (hint, *_) in ALL.items() if plain(hint)]


def plain(hint):
    """Whether a type has a number without a Range in it."""
    if get_origin(hint) is Annotated and any(isinstance(x, Range) for x in hint.__metadata__):
        return False
    return hint in (int, float) or (get_origin(hint) is not Literal and any(map(plain, get_args(hint))))


def test_a_recipe_that_was_edited():
    """A wrong value in the file itself is named as its flag."""
    config = RECIPES["sid_sd15"]
    edited = replace(config, method=replace(config.method, p_drop=3.0))
    with patch.dict(RECIPES, edited=edited):
        refused("edited", "method.p_drop", [])


# values that the authors' public code or its commands give, at the commits of docs/recipes.md
CODE = {
    "pso_dreambooth_sdxl": {"method.neg_defactor": 0.1, "method.gamma": 0.5, "adam_weight_decay": 1e-4},
    "pso_sdxl": {"adam_weight_decay": 1e-6, "method.beta": 50, "method.eps": 0.1, "student.lora.alpha": 16},
    "sfd_cifar10": {
        "method.forget": (0,),
        "method.override": (1,),
        "method.keep": (1, 2, 3, 4, 5, 6, 7, 8, 9),
        "max_grad_value": 1,
        "fake_max_grad_value": 1,
    },
    "sfd_sd15": {"ema_half_life": 0, "learning_rate": 1e-6, "fake_learning_rate": 3e-6},
    "dmd2_wan": {
        "method.guidance": 3,
        "method.times.law.s": 5,
        "method.times.low": 0.02,
        "method.times.high": 0.98,
        "method.fake_times.law.s": 5,
        "adam_weight_decay": 0.01,
        "max_grad_norm": 10,
        "student.times": (1, 0.9375, 5 / 6, 0.625),
        "ema_half_life": 0,
    },
    "phased_wan": {
        "method.times.s": 7,
        "method.times.law.low": 0.02,
        "method.times.law.high": 0.98,
        "method.margin": 0.04,
        "student.times": (1, 21 / 22, 0.875, 0.7),
        "max_grad_norm": 10,
    },
    "nct_sd15": {"train_batch_size": 128, "adam_beta1": 0.9, "adam_beta2": 0.95},
    "lcm_lora_sdxl": {"method.guidance": (4, 16), "method.embed": False, "adam_weight_decay": 0, "learning_rate": 1e-4},
    "pcm_sdxl": {"method.guidance": (7, 8), "method.embed": False, "method.N": 40, "adam_weight_decay": 0},
    "sana_sprint": {"lr_warmup_steps": -(-5000 // 32), "method.warmup": 4000 // 2, "max_train_steps": 20_000 // 2},
    "rcm_wan": {"lr_warmup_steps": 100, "ema_width": 0.1, "adam_weight_decay": 0.01, "max_grad_norm": None},
    "f_distill_sd15": {
        "method.every": 9,
        "method.gan_fake": 1,
        "method.fake_space": "x0",
        "method.times.low": 0.001,
        "max_grad_norm": 10,
        "fake_max_grad_norm": 0,
    },
    "meanflow_sana": {"method.norm": "rms", "method.floor": 10, "method.warmup": 2000, "adam_beta2": 0.99},
    "ode_sdxl": {"lr_warmup_steps": 8, "max_grad_norm": None, "adam_weight_decay": 0.01},
    **{name: {"optimizer": "radam"} for name in ("ect_cifar10", "tcm_cifar10", "ict_cifar10")},
}


@pytest.mark.parametrize("recipe", CODE)
def test_values_of_the_code(recipe):
    values = {name.removeprefix("train."): value for name, *_, value in iterate_fields(RECIPES[recipe])}
    for name, value in CODE[recipe].items():
        assert values[name] == (pytest.approx(value) if isinstance(value, tuple | float) else value), name


def test_every_recipe_has_a_source():
    """docs/recipes.md has a row for each recipe that is not of the digits, and no other."""
    rows = [line.split("|")[1].strip() for line in (ROOT / "docs/recipes.md").read_text().splitlines() if "|" in line]
    found = rows[len(rows) - rows[::-1].index("recipe") + 1 :]
    assert found == sorted(name for name in RECIPES if "digits" not in name)


@pytest.mark.parametrize("recipe", {type(config.method): r for r, config in RECIPES.items()}.values())
def test_a_written_configuration_is_read_again(recipe, tmp_path):
    (tmp_path / "config.yaml").write_text(dump(RECIPES[recipe]))
    assert parse(RECIPES[recipe], ["--config", f"{tmp_path / 'config.yaml'}"]) == RECIPES[recipe]
