"""Progress on stderr: a bar on a terminal; elsewhere, for example in a job's log file, a line from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
LEAST = 10.0  # minimum seconds between two lines; or a tenth of the elapsed time, if that is more
MOST = 600.0  # maximum seconds between two lines


class LineStream:
    """stderr for tqdm that prints each update as a new line instead of overwriting the last one.

    An update that equals the last one is not printed again.
    """

    last = ""

    def write(self, text: str) -> None:
        text = text.strip()
        if text not in ("", self.last):
            sys.stderr.write(f"{text}\n")
            self.last = text

    def flush(self) -> None:
        sys.stderr.flush()


class LineProgress(tqdm):
    """A progress bar as lines: at the start, after the first unit, then at growing intervals, and at the end."""

    def __init__(self, **options: Any) -> None:
        self.has_moved = False
        text = "{desc}{n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        fixed = {"file": LineStream(), "miniters": 1, "mininterval": LEAST, "maxinterval": MOST, "bar_format": text}
        super().__init__(**options | fixed | {"leave": True})

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if not self.has_moved and self.n > self.initial:
            self.has_moved = True
            self.refresh()
        return shown

    def moveto(self, n: int) -> None:
        """Do nothing: the lines of nested bars follow each other, and no cursor moves."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self.mininterval = min(max(self.format_dict["elapsed"] / 10, LEAST), MOST)
        return super().display(msg, pos)

    def set_postfix(self, *values: object, refresh: bool = False, **named: object) -> None:
        super().set_postfix(*values, refresh=False, **named)


def bar(total: int, unit: str, title: str = "", shown: bool = True, first: int = 0, leave: bool = False) -> tqdm:
    """A progress bar of `total` units, the first `first` of which are done. leave: keep it on the terminal at the
    end."""
    options = {"total": total, "unit": unit, "initial": first, "desc": f"{title}: " * bool(title), "leave": leave}
    if not shown:
        return tqdm(**options, disable=True)
    return tqdm(**options, dynamic_ncols=True) if sys.stderr.isatty() else LineProgress(**options)


def track(items: Sequence[T], unit: str, title: str = "", shown: bool = True) -> Iterator[T]:
    """The items, with a progress bar."""
    with bar(len(items), unit, title, shown) as progress:
        for item in items:
            yield item
            progress.update()


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Print the start of a stage and its duration on stderr."""
    start = time.monotonic()
    sys.stderr.write(f"{title} ...\n")
    yield
    sys.stderr.write(f"{title}: {format_seconds(time.monotonic() - start)}\n")


def format_seconds(seconds: float) -> str:
    """Seconds in a readable form: 42 s, 3:05 min, 2:10 h."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    minutes, rest = divmod(rounded, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
