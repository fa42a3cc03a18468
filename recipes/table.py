"""A row of a table of values: how one method is run on a built-in teacher, and what a reader must know of it."""

from __future__ import annotations

from dataclasses import dataclass

from distill.configuration import Config


@dataclass(frozen=True)
class Row:
    """A method on a built-in teacher.

    title: what it is. advice: when to choose it, and what goes wrong. note: how to run what is more than one run, and
    what was measured.
    """

    title: str
    advice: str
    note: str
    config: Config

    @property
    def text(self) -> str:
        """What --help says of it."""
        return "\n\n".join(filter(None, (self.title, self.note, self.advice)))
