"""HTML from literals and values. Values are escaped here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

NOTHING = Markup()


def tag(literal: str, *values: object, **named: object) -> Markup:
    """HTML with a value in every {}. Values are escaped, unless they are HTML that this function made.

    literal: a constant of the source, never a value; tests/eval/test_page.py looks at every call.
    """
    return Markup(literal).format(*values, **named)


def join(parts: Iterable[str], between: str = "") -> Markup:
    """The parts joined. Parts that are no HTML are escaped."""
    return Markup(between).join(parts)
