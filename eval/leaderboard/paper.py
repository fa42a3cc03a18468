"""The tables and plots of a leaderboard as files for a paper: CSV, LaTeX, SVG and PDF.

A table is named by its protocol and hash; a plot also by its metric and its cost.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from eval.leaderboard.drawings import pdf, standalone_svg
from eval.leaderboard.page import draw_scatter_plots, model_styles
from eval.leaderboard.tables import Board, Cell, Row, columns, group_boards, metric_label

ARROWS = {"lower": r" $\downarrow$", "higher": r" $\uparrow$"}
ESCAPES = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def paper_files(rows: Sequence[Row]) -> dict[str, bytes]:
    """{name: content} of the files of all tables."""
    files: dict[str, bytes] = {}
    for board in group_boards(rows):
        stem = re.sub(
            r"[^\w.-]+", "_", "-".join(filter(None, (board.protocol, board.hash[:8], board.extractor_hash[:6])))
        )
        stem = f"{stem}-{board.n}" if board.n else stem
        files[f"{stem}.csv"] = csv_table(board).encode()
        files[f"{stem}.tex"] = latex_table(board).encode()
        for metric in board.metrics:
            for axis, drawing in draw_scatter_plots(board, metric, model_styles(board)).items():
                name = _file_name(stem, metric, axis)
                files[f"{name}.svg"] = standalone_svg(drawing).encode()
                files[f"{name}.pdf"] = pdf(drawing)
    return files


def _file_name(*parts: object) -> str:
    """The parts that are not empty, without characters that file systems or LaTeX may not like."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", "-".join(str(part) for part in parts if part))


def csv_table(board: Board) -> str:
    """A board as CSV: numbers in full, low and high of an interval in columns of their own."""
    of_heading = columns(board)
    rows = [*board.rows, *board.real]
    head = []
    for heading in of_heading:
        head += [heading, f"{heading} low", f"{heading} high"] if heading in board.metrics else [heading]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*head, "protocol", "protocol_hash", "n", "extractor", "extractor_hash", "seeds"])
    for i, row in enumerate(rows):
        line: list[object] = []
        for heading, cells in of_heading.items():
            line.append(cells[i].key)
            if heading in board.metrics:
                figure = row["metrics"].get(heading, {})
                line += [figure.get("low"), figure.get("high")]
        seeds = " ".join(map(str, row.get("seeds") or ()))
        writer.writerow([*line, board.protocol, board.hash, board.n, board.extractor, board.extractor_hash, seeds])
    return stream.getvalue()


def latex_table(board: Board) -> str:
    """A board as a table of LaTeX with booktabs: intervals in small type, figures of rank 1 in bold."""
    of_heading = columns(board)
    heads = []
    for heading in of_heading:
        better = board.better(heading) if heading in board.metrics else None
        heads.append(_escape_latex(metric_label(heading)) + ARROWS.get(better or "", ""))
    count = len(board.rows) + len(board.real)
    lines = [" & ".join(_latex_cell(cells[i]) for cells in of_heading.values()) + r" \\" for i in range(count)]
    if board.rows and board.real:
        lines.insert(len(board.rows), r"\midrule")
    return "\n".join(
        [
            f"% {' '.join(board.title.split())}; \\usepackage{{booktabs}}",
            rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _latex_cell(cell: Cell) -> str:
    text = _escape_latex(cell.text) or "--"
    if cell.rank == 1:
        text = rf"\textbf{{{text}}}"
    return text + (rf" {{\scriptsize [{cell.span.replace(' to ', ', ')}]}}" if cell.span else "")


def _escape_latex(text: str) -> str:
    return "".join(ESCAPES.get(character, character) for character in text)
