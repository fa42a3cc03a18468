"""Escape values for Markdown: plain text, and code blocks that their content cannot close."""

from __future__ import annotations

import html
import re
from urllib.parse import quote


def escape_markdown(value: object) -> str:
    """Escape text for a paragraph, heading or table cell, so that it forms no HTML, link, code, emphasis or line."""
    line = " ".join(str(value).split())
    marked = re.sub(r"([\\`*|~])|(\](?=[(\[:]|$))|(?<![^\W_])(_)|(_)(?![^\W_])", r"\\\1\2\3\4", line)
    return html.escape(marked, quote=False)


def unescape(text: str) -> str:
    """The inverse of `escape_markdown`, for text of one line."""
    return re.sub(r"\\([\\`*|~\]_])", r"\1", html.unescape(text))


def link(title: object, target: str) -> str:
    """A link to a web address or to a file in the same folder. For another scheme only the title."""
    if re.match(r"(?!https?:)[\w.+-]+:", target.strip()):
        return escape_markdown(title)
    return f"[{escape_markdown(title)}]({quote(target.strip(), safe=':/?#@!$&+,;=%~')})"


def fenced(code: str, language: str = "") -> str:
    """A code block. Its fence is longer than every run of backticks inside."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"
