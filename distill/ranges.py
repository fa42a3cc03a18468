"""Ranges of configuration values, in the types of the fields: --help shows them, `validate_ranges` checks them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

MOST = 2**31 - 1  # largest count: sample indices are words of 32 bits (random.py)
NAME = 255  # maximum bytes of a file name
PATH = 4000  # maximum bytes of a path


class Range(PrimitiveConstructorSpec[Any]):
    """Metadata of a field's type: finite numbers of a kind from `low` to `high`. ends: "[)" means the range [0, 1)."""

    def __init__(self, kind: type, low: float = -math.inf, high: float = math.inf, ends: str = "[]") -> None:
        self.kind = kind
        self.low = low
        self.high = high
        self.ends = ends
        name = kind.__name__.upper()
        left, right = ("<" + "=" * (end in "[]") for end in ends)
        if high < MOST:
            name = f"{low}{left}{name}{right}{high}"
        elif low > -math.inf:
            name = f"{name}{left.replace('<', '>')}{low}"
        super().__init__(1, name, lambda s: kind(s[0]), lambda x: isinstance(x, int | float), lambda x: [f"{x}"])

    def __contains__(self, value: Any) -> bool:
        known = isinstance(value, int if self.kind is int else int | float) and not isinstance(value, bool)
        if not known or not (isinstance(value, int) or math.isfinite(value)):
            return False
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    def __str__(self) -> str:
        lower = "at least" if self.ends[0] == "[" else "above"
        upper = "at most" if self.ends[1] == "]" else "below"
        if self.high == math.inf:
            return "finite" if self.low == -math.inf else f"{lower} {self.low} and finite"
        return f"{upper} {self.high}" if self.low == -math.inf else f"{lower} {self.low} and {upper} {self.high}"

    __repr__ = __str__  # tyro prints it for members of a union


Count = Annotated[int, Range(int, 1, MOST)]
Calls = Annotated[int, Range(int, 1, 1000)]  # successive calls of a network
Points = Annotated[int, Range(int, 1, 100_000)]  # points of a discretisation; memory holds as many numbers
Side = Annotated[int, Range(int, 1, 1 << 14)]  # pixels per side
Words = Annotated[int, Range(int, 0, 10_000)]  # tokens of a prompt; a network learns a vector for each
Natural = Annotated[int, Range(int, 0, MOST)]
Seed = Annotated[int, Range(int, 0, 2**32 - 1)]  # range of NumPy's seeds
Finite = Annotated[float, Range(float)]
Positive = Annotated[float, Range(float, 0, ends="(]")]
Weight = Annotated[float, Range(float, 0)]
UnitInterval = Annotated[float, Range(float, 0, 1)]
Decay = Annotated[float, Range(float, 0, 1, "[)")]
Width = Annotated[float, Range(float, 0, 0.28, "(]")]  # relative width of an average's weights; equal weights have .289


def iterate_fields(config: Any, path: str = "") -> Iterator[tuple[str, Any, Field[Any], Any]]:
    """(name, type, field, value) of every field of a dataclass. Fields of nested dataclasses have dotted names."""
    hints = _hints(type(config))  # type: ignore[arg-type]
    for field in fields(config):
        value = getattr(config, field.name)
        name = f"{path}{field.name}"
        if is_dataclass(value):
            yield from iterate_fields(value, f"{name}.")
        else:
            yield name, hints[field.name], field, value


def validate_ranges(config: Any, path: str = "") -> None:
    """ValueError that names the first invalid field of a dataclass or of a nested dataclass.

    A number must be in the Range of its type. A string or a tuple may be empty only if its default is empty. A string
    must be printable, and short enough for a file name.
    """
    for name, hint, field, value in iterate_fields(config, path):
        if value is None and type(None) in get_args(hint):
            continue
        or_none = ", or None" * (type(None) in get_args(hint))
        if value in ("", ()) and field.default != value:
            raise ValueError(f"{name} is empty; give {'at least one' if value == () else 'it a value'}{or_none}")
        for part in value if isinstance(value, tuple) else (value,):
            if (range := _find_range(hint)) and part not in range:
                raise ValueError(f"{name} is {part!r}; it must be {range}{or_none}")
            if isinstance(part, str) and not _could_be_path(part):
                raise ValueError(
                    f"{name} is {part[:NAME]!r}; it must be printable, its parts between / of at most {NAME} bytes, "
                    f"{PATH} in all{or_none}"
                )
            if part == "" and isinstance(value, tuple):
                raise ValueError(f"{name} is {value!r}; none of it may be empty")


def _could_be_path(text: str) -> bool:
    """Whether a text is printable and no longer than a path may be."""
    return text.isprintable() and len(text.encode()) <= PATH and all(len(p.encode()) <= NAME for p in text.split("/"))


def _find_range(hint: Any) -> Range | None:
    """The Range in a type: of the number itself, or of the members of its tuple or union. None if there is none."""
    if isinstance(hint, Range):
        return hint
    inner = (*get_args(hint), *getattr(hint, "__metadata__", ()))
    return next(filter(None, map(_find_range, inner)), None)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
