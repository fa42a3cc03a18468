"""Any method on any family of teachers, with the family's and the method's own values.

`accelerate launch -m recipes.train --method NAME --teacher digits|world|FOLDER|HUBNAME`, and every flag of a recipe.
Before the run starts it prints each value that is not the class's default, and where it comes from: the family of the
teacher, a recipe, the table of the digits or of the captioned world, or the command line.
With --smoke --teacher FAMILY it trains two steps on a tiny random teacher of the family.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from distill.configuration import ALIASES, Config, fail, parse, read_run_config
from distill.files import rank
from distill.layout import program_name
from pipelines import run
from recipes import values
from recipes.values import Layer

TEACHER = ("teacher", *ALIASES)
WIDTH = 48  # characters of a value that are shown; config.yaml has all


class Selection(NamedTuple):
    """A method on a teacher: its layers of values, the flags that go on top, and what --help says of it."""

    layers: list[Layer]
    flags: list[str]
    text: str


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, print the values with their sources, and run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if find_flag(argv, "method") is None and {"--help", "-h"} & {*argv}:
        sys.stdout.write(format_usage())
        raise SystemExit(0)
    try:
        layers, flags, text = select(argv)
    except ValueError as error:
        fail(f"{error}")
    config = parse(layers[-1].config, flags, text)
    if message := values.describe_missing_teacher(config):
        fail(message)
    if rank() == 0:
        sys.stdout.write(format_sources([*layers, Layer("command line", config)]))
    run.main(config, [])


def select(argv: list[str]) -> Selection:
    """The method and the teacher that a command line names; a --config or --replay names both where no flag does."""
    method, flags = pop_flag(argv, ("method",))
    teacher, flags = pop_flag(flags, TEACHER)
    path = find_flag(flags, "config") or find_flag(flags, "replay")
    if path and not (method and teacher):
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        _, class_name, tree = read_run_config(folder)
        method = method or class_name
        teacher = teacher or tree["teacher"]
    if method is None:
        raise ValueError(f"no method given: pass --method, one of {', '.join(sorted(values.list_methods()))}")
    if teacher is None:
        raise ValueError("no teacher given: pass --teacher, which is digits, world, a folder or a Hub name")
    name = values.find_method(method)
    source = values.find_teacher(teacher, name, find_flag(flags, "revision"), "--smoke" in flags)
    layers = values.resolve_layers(name, source)
    text = f"{name} on a teacher of the family {source.family}."
    if source.table:
        text = values.TABLES[source.table][name].text
    if source.name and teacher not in values.TABLES:
        flags = [*flags, "--teacher", source.name]
    return Selection(layers, flags, text)


def resolve(argv: list[str]) -> tuple[Config, list[str]]:
    """(values, flags that go on top) of a command line: what `python -m pipelines.plan recipes/train.py` reads."""
    selection = select(argv)
    return selection.layers[-1].config, selection.flags


def find_flag(argv: list[str], name: str) -> str | None:
    """The value of a flag, the last one where it stands more than once; None where it has none."""
    try:
        return pop_flag(argv, (name,))[0]
    except ValueError:
        return None  # the parser says so


def pop_flag(argv: list[str], names: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """(value of the flag that has one of the names, the other arguments); ValueError for a flag without a value."""
    value = None
    others = []
    words = iter(argv)
    for word in words:
        flag, equals, text = word.partition("=")
        if not flag.startswith("--") or flag[2:].replace("-", "_") not in names:
            others.append(word)
            continue
        value = text if equals else next(words, None)
        if not value or value.startswith("--"):
            raise ValueError(f"{flag} needs a value: {flag} NAME")
    return value, others


def format_sources(layers: list[Layer]) -> str:
    """A line for each value that is not its class's default: the flag, the value, the source."""
    rows = [(f"--{name}", shorten(f"{value}"), source) for name, value, source in values.list_sources(layers)]
    flags = max((len(flag) for flag, _, _ in rows), default=0)
    width = max((len(value) for _, value, _ in rows), default=0)
    lines = [f"  {flag:{flags}}  {value:{width}}  {source}\n" for flag, value, source in rows]
    config = layers[-1].config
    return f"{type(config.method).__name__} on {config.family}; what is no default:\n{''.join(lines)}"


def shorten(value: str) -> str:
    """The value, or its beginning where it is long."""
    return value if len(value) <= WIDTH else f"{value[: WIDTH - 4]} ..."


def format_usage() -> str:
    """What --help says where no method is named."""
    names = "\n".join(f"  {name}" for name in sorted(values.list_methods()))
    line = f"usage: {program_name()} --method NAME --teacher TEACHER ...          with --help it shows every flag"
    return f"{line}\n\n{__doc__}\nNAME is one of\n{names}\n"


if __name__ == "__main__":
    main()
