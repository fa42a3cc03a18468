"""Messages for the user's terminal. It imports no library that takes time."""

from __future__ import annotations

import sys
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Print one message for the user to stderr and exit with status 2."""
    sys.stderr.write(f"error: {escape_for_terminal(message)}\n")
    raise SystemExit(2)


def escape_for_terminal(text: str) -> str:
    """Escape control characters except newlines, so that file contents cannot control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
