"""The nearest known name to one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_name(name: str, known: Iterable[str]) -> str:
    """ "; NAMES are the nearest" for a message, with up to three known names; empty if none is near."""
    names = difflib.get_close_matches(name.lower(), list(known), 3, 0.5)
    if not names:
        return ""
    return f"; {', '.join(names)} {'is' if len(names) == 1 else 'are'} the nearest"
