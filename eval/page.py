"""Rows of figures -> one page that is complete in itself: it asks for no network, and says all without its script."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import plots
from eval.report import (
    COSTS,
    Board,
    Cell,
    Row,
    boards,
    columns,
    headline,
    interval,
    is_real,
    is_teacher,
    label,
    lower,
    pretty,
    provenance,
)

AXES = {  # cost of a scatter plot: what stands along the axis, how a tick is written
    "nfe": ("network evaluations an image", plots.short),
    "latency": ("seconds an image, alone", plots.duration),
}
STYLES = 6  # s0 ... s5 in the style sheet
text = lambda value: html.escape(str(value), quote=True)


def page(
    rows: Sequence[Row],
    title: str = "Leaderboard",
    lead: str = "",
    runs: Mapping[str, Path] | None = None,
    failed: Mapping[str, str] | None = None,
) -> str:
    """The whole page as HTML: a section a board, then sample grids, training curves, and what failed.

    rows: as `report.checked` takes them. lead: a paragraph under the headline. runs: name -> log.jsonl. failed: name
    of an entry without a row -> why. ValueError for rows or a log that cannot be read.
    """
    found = boards(rows)
    several = len(found) > 1
    body = [section(board, i, several) for i, board in enumerate(found)]
    training = "".join(f"<h3>{text(name)}</h3>{plots.training(name, path)}" for name, path in (runs or {}).items())
    wrong = "".join(f"<dt>{text(name)}</dt><dd><pre>{text(why)}</pre></dd>" for name, why in (failed or {}).items())
    tables = f"{len(found)} tables: figures of different protocols, image counts or extractors never share one."
    parts = [
        f'<header><p class="kicker">{text(title)}</p><h1>{text(headline(found[0]))}</h1>',
        f'<p class="lead">{text(lead)}</p>' if lead else "",
        f'<p class="lead">{tables}</p>' if several else "",
        "</header>",
        f'<section class="failed"><h2>Failed</h2><dl>{wrong}</dl></section>' if wrong else "",
        *body,
        samples(rows),
        f"<section><h2>Training</h2>{training}</section>" if training else "",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{asset('page.css')}</style></head><body><main>{''.join(parts)}</main>"
        f"<script>{asset('page.js')}</script></body></html>\n"
    )


def asset(name: str) -> str:
    """The style sheet or the script, which lie beside this file."""
    return (Path(__file__).parent / name).read_text()


def section(board: Board, number: int, several: bool) -> str:
    """One board: its table, its plots, how its figures were made."""
    heading = f"{text(board.protocol)} <small>{text(board.hash)}</small>" if several else "Figures"
    return (
        f'<section id="board-{number}"><h2>{heading}</h2>{table(board)}<p class="note">{legend(board)}</p>'
        f"{scatters(board, number)}{protocol(board)}</section>"
    )


def table(board: Board) -> str:
    """The sortable table. Every cell carries the key that it is sorted by; real images stay at the foot."""
    found = columns(board)
    first = board.metrics[0] if board.metrics else None
    heads = []
    for heading in found:
        best = "descending" if heading in board.metrics and not lower(heading) or heading == "images/s" else "ascending"
        order = f' aria-sort="{best}"' if heading == first else ""
        arrow = f" <i>{'lower' if lower(heading) else 'higher'} is better</i>" if heading in board.metrics else ""
        heads.append(
            f'<th scope="col" data-first="{best}"{order}><button type="button">{text(pretty(heading))}'
            f"</button>{arrow}</th>"
        )
    lines = []
    for i, row in enumerate((*board.rows, *board.real)):
        cells = "".join(cell(c[i], heading in board.metrics) for heading, c in found.items() if heading != "model")
        key = text(found["model"][i].key)
        kind = "real" if is_real(row) else "teacher" if is_teacher(row) else "student"
        lines.append(f'<tr class="{kind}"><th scope="row" data-key="{key}">{key}</th>{cells}</tr>')
    here, foot = "".join(lines[: len(board.rows)]), "".join(lines[len(board.rows) :])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(board.title)}"><table class="sortable">'
        f"<caption>Protocol {text(board.title)}</caption><thead><tr>{''.join(heads)}</tr></thead><tbody>{here}</tbody>"
        f"{f'<tfoot>{foot}</tfoot>' if foot else ''}</table></div>"
    )


def cell(cell: Cell, figure: bool) -> str:
    """One cell: the figure, its rank, its interval under them."""
    key = "" if cell.key is None else f' data-key="{text(cell.key)}"'
    if not figure or not cell.text:
        return f"<td{key}>{text(cell.text) or '<span class=none>-</span>'}</td>"
    rank = f'<b class="rank{" top" if cell.rank == 1 else ""}">{cell.rank}{" tie" if cell.tie else ""}</b>'
    span = f"<small>{text(cell.span)}</small>" if cell.span else ""
    return f'<td{key}><span class="figure">{rank if cell.rank else ""}{text(cell.text)}</span>{span}</td>'


def legend(board: Board) -> str:
    """What the marks of a table mean, as far as they occur in it."""
    marks = [c for cells in columns(board).values() for c in cells]
    words = ["Click a heading to sort."]
    if any(c.rank for c in marks):
        words += ["The number before a figure is its rank: one more than the rows whose whole interval is better."]
    words += ["Rows that share a rank are a tie."] * any(c.tie for c in marks)
    machines = {(r.get("cost") or {}).get("hardware") for r in board.rows} - {None}
    words += [f"Speed and memory were measured on {machines.pop()}."] if len(machines) == 1 else []
    return text(" ".join(words))


def scatters(board: Board, number: int) -> str:
    """Quality against each cost, a plot a metric, of which the script shows the chosen one (without it the first).

    Latencies of different machines are different plots.
    """
    machines = sorted({r["cost"]["hardware"] for r in board.rows if (r.get("cost") or {}).get("latency")} - {None})
    kinds = [("nfe", None, "")] + [("latency", m, f", on {m}" if len(machines) > 1 else "") for m in machines]
    models = list(dict.fromkeys(str(r["model"]) for r in board.rows if not is_teacher(r)))
    styles = {model: f"s{i % STYLES}" for i, model in enumerate(sorted(models))}
    figures: list[str] = []
    names: list[str] = []
    for metric in board.metrics:
        drawn = []
        for key, machine, more in kinds:
            points = scatter_points(board, metric, key, machine, styles)
            if points:
                real = [(str(r["model"]), r["metrics"][metric]["value"]) for r in board.real if metric in r["metrics"]]
                name, tick = AXES[key]
                up = pretty(metric)
                drawn.append(plots.scatter(points, lower(metric), name + more, up, real[0] if real else None, tick))
        if drawn:
            hidden = " hidden" if names else ""
            names.append(metric)
            box = "".join(f"<figure>{one}</figure>" for one in drawn)
            figures.append(f'<div class="plots" data-metric="{text(metric)}"{hidden}>{box}</div>')
    if not names:
        return '<p class="note">No row has a metric with a cost beside it, so there is no plot.</p>'
    options = "".join(f'<option value="{text(n)}">{text(pretty(n))}</option>' for n in names)
    choose = f'<label class="choose">Quality <select>{options}</select></label>' if len(names) > 1 else ""
    return (
        f'<div class="quality"><div class="bar"><h3>Quality against cost</h3>{choose}</div>{"".join(figures)}'
        '<p class="note"><span class="key"></span>The Pareto front: nothing cheaper is as good. Bars are the intervals '
        "of the table; rows of one model that differ in steps are joined. Hover over a point for its name.</p></div>"
    )


def scatter_points(
    board: Board, metric: str, key: str, machine: str | None, styles: Mapping[str, str]
) -> list[plots.Point]:
    """The rows that have the metric and the cost (measured on `machine`, if it is one that is measured)."""
    out = []
    for row in board.rows:
        cost = row.get("cost") or {}
        if metric not in row["metrics"] or not cost.get(key) or (machine and cost.get("hardware") != machine):
            continue
        figure = row["metrics"][metric]
        low, high = interval(figure)
        style = "teacher" if is_teacher(row) else styles[str(row["model"])]
        series = f"{row['model']} {row.get('guidance')}"
        span = (low, high) if low < high else (None, None)
        out.append(plots.Point(cost[key], figure["value"], label(row, board.rows), style, series, *span))
    return out


def protocol(board: Board) -> str:
    """How every figure of a board was made: the protocol in full where this version knows it, then row by row."""
    known = described(board.protocol, board.hash)
    lines = []
    for row in (*board.rows, *board.real):
        facts = "".join(f"<td>{text(dict(provenance(row)).get(k, '-'))}</td>" for k in ("seeds", "commit", "hardware"))
        cost = row.get("cost") or {}
        spans = "".join(
            f"<td>{figure.get('n') if figure.get('n') is not None else '-'}</td>"
            for figure in [row["metrics"].get(m, {}) for m in board.metrics]
        )
        machine = text(cost.get("hardware") or "-") if any(cost.get(k) for k in COSTS) else "-"
        lines.append(f"<tr><th scope=row>{text(label(row, board.rows))}</th>{facts}<td>{machine}</td>{spans}</tr>")
    counts = "".join(f'<th scope="col">n of {text(pretty(m))}</th>' for m in board.metrics)
    head = (
        '<tr><th scope="col">model</th><th scope="col">seeds</th><th scope="col">commit</th>'
        f'<th scope="col">made on</th><th scope="col">speed of</th>{counts}</tr>'
    )
    return (
        f"<details><summary>How these figures were made: protocol {text(board.protocol)}, hash {text(board.hash)}"
        f'</summary>{known}<div class="scroll" tabindex="0" role="region" aria-label="provenance"><table>'
        f"<thead>{head}</thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def described(name: str, hash_: str) -> str:
    """A protocol's own fields, where it is known here under that hash."""
    from dataclasses import asdict

    from eval.protocols import PROTOCOLS

    found = PROTOCOLS.get(name)
    if found is None or found.hash != hash_:
        why = "is none that this version knows" if found is None else f"is {found.hash} in this version: they differ"
        return f'<p class="note">Protocol {text(name)}, hash {text(hash_)}, {text(why)}.</p>'
    fields = {k: v for k, v in asdict(found).items() if v not in (None, "", (), [])}
    written = lambda v: v if isinstance(v, str) else json.dumps(v, indent=1)
    items = "".join(f"<dt>{text(k)}</dt><dd>{text(written(v))}</dd>" for k, v in fields.items())
    return f"<dl>{items}</dl>"


def samples(rows: Sequence[Row]) -> str:
    """Grids of the rows' folders, side by side: those of the same prompts, labels and noise under one heading."""
    from eval import images as folders

    groups: dict[tuple[Any, ...], list[str]] = {}
    absent, seen = [], set()
    for row in rows:
        folder = row.get("samples")
        if not folder or folder in seen:
            continue
        seen.add(folder)
        if not Path(folder).is_dir():
            absent.append(f"{label(row, rows)} ({folder})")
            continue
        images, labels, manifest = folders.read(folder, first=120)
        seed, prompts = manifest.get("seed"), manifest.get("prompts") or str(manifest.get("labels"))
        size = tuple(images.shape[-2:])
        nfe = (row.get("cost") or {}).get("nfe") or manifest.get("nfe")
        cost = f"{nfe} network call{'s' if nfe != 1 else ''}" if nfe else ""
        large = max(size) > 64
        picture = plots.grid(images[:8] if large else images, labels if not large else None, columns=4 if large else 10)
        alt = f"samples of {label(row, rows)}"
        groups.setdefault((size, seed, prompts), []).append(
            f"<figure><figcaption><b>{text(label(row, rows))}</b><span>{cost}</span></figcaption>"
            f'<img src="{picture}" alt="{text(alt)}"{" class=pixels" if not large else ""}></figure>'
        )
    if not groups and not absent:
        return ""
    parts = []
    for (_, seed, _), figures in groups.items():
        noise = "of unknown noise" if seed is None else f"of seed {seed}"
        same = "The same prompts and the same noise at the same place of every grid, "
        note = f"{same if len(figures) > 1 and seed is not None else ''}{noise}, not selected."
        parts.append(
            f'<p class="note">{text(note[0].upper() + note[1:])}</p><div class="grids">{"".join(figures)}</div>'
        )
    gone = f'<p class="note">Not on this machine: {text("; ".join(absent))}.</p>' if absent else ""
    return f"<section><h2>Samples</h2>{''.join(parts)}{gone}</section>"
