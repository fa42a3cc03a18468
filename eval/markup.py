"""HTML out of literals and values. Here, and nowhere else, values are escaped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

NOTHING = Markup()


def tag(literal: str, *values: Any, **named: Any) -> Markup:
    """HTML with a value in every {}. Values are escaped, unless they are HTML that this function made.

    literal: a constant of the source, never a value; tests/eval/test_page.py looks at every call.
    """
    return Markup(literal).format(*values, **named)


def join(parts: Iterable[Any], between: str = "") -> Markup:
    """Parts one after another, escaped where they are no HTML."""
    return Markup(between).join(parts)
