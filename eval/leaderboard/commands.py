"""Rows of figures -> a Markdown table and one self-contained page; many models -> rows, as one job.

python -m eval.leaderboard page runs/a/rows.json runs/b/rows.json --out runs/board     the page of scored folders
python -m eval.leaderboard run board.yaml                    many models as one job (entries.py), then the page
python -m eval.leaderboard card runs/board/rows.json --model dmd2 --folder runs/dmd2/pipeline       into a model's card
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from distill.files import atomic_file, write_atomically
from eval.cli import PartialFailure
from eval.files import check_output, read_json, write_json
from eval.leaderboard import entries
from eval.leaderboard.page import build_html_page as html_page
from eval.leaderboard.paper import paper_files
from eval.leaderboard.tables import (
    Row,
    average_seeds,
    drop_duplicates,
    group_boards,
    markdown_tables,
    metric_label,
    validate_rows,
)
from pipelines.export.card import Result, add_results
from pipelines.markdown import escape_markdown


def write_page(
    out: Path,
    rows: Sequence[Row],
    title: str = "Leaderboard",
    lead: str = "",
    runs: Mapping[str, Path] | None = None,
    failed: Mapping[str, str] | None = None,
) -> Path:
    """Write rows.json, leaderboard.md, index.html and paper/ to the folder `out`; the page's path.

    See `build_html_page`, and for paper/ eval/leaderboard/paper.py.
    """
    html = html_page(rows, title, lead, runs, failed)
    words = markdown_tables(rows)
    write_json(out / "rows.json", list(rows))
    for name, content in (("leaderboard.md", f"# {escape_markdown(title)}\n\n{words}"), ("index.html", html)):
        write_atomically(out / name, content)
    (out / "paper").mkdir(exist_ok=True)
    for name, drawing in paper_files(rows).items():
        with atomic_file(out / "paper" / name) as part:
            part.write_bytes(drawing)
    return out / "index.html"


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """The rows of one or more JSON files. ValueError if a file is absent or holds no rows."""
    rows: list[Row] = []
    for path in paths:
        rows += validate_rows(read_json(path, "make it with python -m eval.score"), str(path))
    if not rows:
        raise ValueError("no file of rows was given; name at least one that python -m eval.score wrote")
    return drop_duplicates(rows)


def build_page(
    rows: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
    title: str = "Leaderboard",
    logs: tuple[Path, ...] = (),
    mean: bool = False,
) -> Path:
    """Make the page of scored folders.

    Args:
        rows: JSON files that `eval.score` wrote, also of several machines. A row in two of them counts once.
        out: folder of index.html, leaderboard.md, rows.json and paper/ with CSV, LaTeX, SVG and PDF.
        title: of the page.
        logs: log.jsonl files of training runs to show, each called by the folder that it lies in.
        mean: one row for rows that differ in their seeds alone, with the interval over the seeds.
    """
    check_output(out, "--out", folder=True)
    all_rows = read_rows(rows)
    if mean:
        all_rows = average_seeds(all_rows)
    return write_page(out, all_rows, title, runs={path.parent.name: path for path in logs})


def run_board(
    board: Annotated[Path, tyro.conf.Positional],
    out: Path | None = None,
    cost: bool = True,
    reference: Path | None = None,
) -> Path:
    """Generate and score what a board lists, skip what is done, and make the page.

    A failed entry does not stop the others. The page names it, and the exit code is 1.

    Args:
        board: its YAML file; see eval/leaderboard/entries.py.
        out: instead of the board's own `out`: the folder of images, rows and the page.
        cost: measure latency and memory of every entry, one after the other.
        reference: a folder of real images, or an .npz with mu and sigma, for entries without one of their own.
    """
    tree = entries.read_board(board)
    if out is None and not tree.get("out"):
        raise ValueError(f"{board} has no `out`, the folder to write; add it, or pass --out")
    out = out or Path(str(tree["out"]))
    check_output(out, "out", folder=True)
    if reference is not None:
        tree = {"reference": f"{reference}", **tree}
    todo = entries.list_entries(tree)
    rows, failed = entries.evaluate_entries(todo, out, int(tree.get("workers") or 1), cost)
    reasons = "".join(f"\n{name}: {why}" for name, why in failed.items())
    if not rows:
        raise PartialFailure(f"no entry of {board} has a row{reasons}")
    page = write_page(out, rows, str(tree.get("title") or "Leaderboard"), failed=failed)
    if failed:
        print_tables(page)
        raise PartialFailure(f"{len(failed)} of {len(todo)} entries failed; the page is of the others{reasons}")
    return page


def write_card(rows: Annotated[tuple[Path, ...], tyro.conf.Positional], model: str, folder: Path) -> None:
    """Write the figures of a model's rows into the card of its exported folder: model-index and a table.

    Args:
        rows: JSON files that `eval.score` wrote.
        model: its name in the rows.
        folder: of the export, with its README.md.
    """
    all_rows = read_rows(rows)
    mine = [row for row in all_rows if row["model"] == model]
    if not mine:
        raise ValueError(f"no row is of {model!r}; there are {sorted({str(row['model']) for row in all_rows})}")
    add_results(folder, card_results(mine))


def card_results(rows: Sequence[Row]) -> list[Result]:
    """Every figure of the rows, with the protocol in words: name, hash, images, steps and guidance."""
    out = []
    for board in group_boards(rows):
        for row in board.rows:
            count = row.get("steps")
            guidance = row.get("guidance")
            how = [board.title]
            if count:
                how.append(f"{count} step{'s' * (count > 1)}")
            if guidance not in (None, 0, 1):
                how.append(f"guidance {guidance:g}")
            out += [Result(", ".join(how), metric_label(name), m["value"]) for name, m in row["metrics"].items()]
    return out


def print_tables(page: Path) -> None:
    """Print the tables and the path of the page."""
    from rich.console import Console

    from eval.leaderboard.tables import terminal_tables

    console = Console()
    for one in terminal_tables(json.loads((page.parent / "rows.json").read_text())):
        console.print(one)
    console.print(f"open {page}", highlight=False, soft_wrap=True)


def main() -> None:
    """Command line of `page`, `run` and `card`."""
    from eval.cli import run as command

    page = command({"page": build_page, "run": run_board, "card": write_card})
    if page is not None:
        print_tables(page)
