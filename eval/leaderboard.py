"""Rows of figures -> a Markdown table and one self-contained page; many models -> rows, as one job.

python -m eval.leaderboard page runs/a/rows.json runs/b/rows.json --out runs/board
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from eval.cost import store
from eval.page import page as html_page
from eval.report import Row, checked, markdown


def write(
    out: Path,
    rows: Sequence[Row],
    title: str = "Leaderboard",
    lead: str = "",
    runs: Mapping[str, Path] | None = None,
    failed: Mapping[str, str] | None = None,
) -> Path:
    """Write rows.json, leaderboard.md and index.html to the folder `out`; the page's path. See `page.page`."""
    made, words = html_page(rows, title, lead, runs, failed), markdown(rows)
    store(out / "rows.json", list(rows))
    (out / "leaderboard.md").write_text(f"# {title}\n\n{words}")
    (out / "index.html").write_text(made, encoding="utf-8")
    return out / "index.html"


def read(paths: Sequence[Path]) -> list[Row]:
    """The rows of one or more JSON files. ValueError where one is absent or holds no rows."""
    rows: list[Row] = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no file {path}; make it with python -m eval.score")
        try:
            rows += checked(json.loads(path.read_text()), str(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); make it with python -m eval.score") from None
    if not rows:
        raise ValueError("no file of rows was given; name at least one that python -m eval.score wrote")
    return rows


def page(
    rows: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
    title: str = "Leaderboard",
    logs: tuple[Path, ...] = (),
) -> Path:
    """Make the page of scored folders.

    Args:
        rows: JSON files that `eval.score` wrote.
        out: folder of index.html, leaderboard.md and rows.json.
        title: of the page.
        logs: log.jsonl files of training runs to show, each called by the folder that it lies in.
    """
    return write(out, read(rows), title, runs={path.parent.name: path for path in logs})


def show(made: Path) -> None:
    """The tables in the terminal, and where the page is."""
    from rich.console import Console

    from eval.report import table

    console = Console()
    for one in table(json.loads((made.parent / "rows.json").read_text())):
        console.print(one)
    console.print(f"open {made}", highlight=False, soft_wrap=True)


def main() -> None:
    """Command line of `page`."""
    from eval.cli import run as command

    show(command({"page": page}))


if __name__ == "__main__":
    main()
