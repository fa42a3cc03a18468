"""Patterns of paths: 'a/{00..12}.tar' and 'a/{cats,dogs}' as in a shell, and `*`, `?`, `[0-9]`, `**`."""

from __future__ import annotations

import math
import os
import re
from glob import glob
from itertools import product
from pathlib import Path

LARGEST = 100_000  # paths of one pattern
WILDCARD = re.compile(r"[*?\[]")


def is_pattern(source: str) -> bool:
    """Whether a name holds wildcards, ranges or lists, and does not exist as it stands."""
    several = any(len(options) != 1 for options in _options(source))
    return (several or bool(WILDCARD.search(source))) and not os.path.exists(source)


def expand(source: str) -> list[Path]:
    """The paths of a pattern, in its order; those of a wildcard are sorted. Hidden files fit no wildcard.

    A name that exists stands for itself. ValueError for more than LARGEST paths.
    """
    if not is_pattern(source):
        return [Path(source)]
    options = _options(source)
    _limit(source, math.prod(map(len, options)))
    paths: list[str] = []
    for name in map("".join, product(*options)):
        if WILDCARD.search(name) and not os.path.exists(name):
            paths += sorted(glob(name, recursive=True), key=lambda path: path.split(os.sep))
        else:
            paths.append(name)
    return [Path(path) for path in dict.fromkeys(paths)]


def _options(source: str) -> list[list[str]]:
    """The parts of a name, each with its values: one for plain text, several for a range or a list in braces."""
    options = []
    for part in re.split(r"(\{[^{}]*\})", source):
        if span := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            low = int(span[1])
            high = int(span[2])
            _limit(source, high - low + 1)
            options.append([f"{i:0{len(span[1])}}" for i in range(low, high + 1)])
        elif part.startswith("{") and "," in part:
            options.append(part[1:-1].split(","))
        else:
            options.append([part])
    return options


def _limit(source: str, n: int) -> None:
    if n > LARGEST:
        raise ValueError(f"{source!r} stands for {n:,} files; at most {LARGEST:,} are read: correct its range")
