"""Values in Markdown: text that stays text, and blocks of code that nothing inside can end."""

from __future__ import annotations

import html
import re
from typing import Any
from urllib.parse import quote


def escape_markdown(value: Any) -> str:
    """Text for a paragraph, a heading or a cell of a table: no HTML, link, code, emphasis or line break comes of it."""
    line = " ".join(str(value).split())
    marked = re.sub(r"([\\`*|~])|(\](?=[(\[:]|$))|(?<![^\W_])(_)|(_)(?![^\W_])", r"\\\1\2\3\4", line)
    return html.escape(marked, quote=False)


def unescape(text: str) -> str:
    """The inverse of `plain`, for text of one line."""
    return re.sub(r"\\([\\`*|~\]_])", r"\1", html.unescape(text))


def link(title: Any, target: str) -> str:
    """A link to an address of the web or to a file beside; of another scheme the title alone."""
    if re.match(r"(?!https?:)[\w.+-]+:", target.strip()):
        return escape_markdown(title)
    return f"[{escape_markdown(title)}]({quote(target.strip(), safe=':/?#@!$&+,;=%~')})"


def fenced(code: str, language: str = "") -> str:
    """A block of code. Its fence is longer than every run of backticks inside."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"
