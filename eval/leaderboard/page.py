"""Rows of figures -> one self-contained HTML page: it needs no network and is readable without JavaScript.

Every value of a row reaches the page through `markup.tag`, which escapes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.leaderboard import plots
from eval.leaderboard.tables import (
    COSTS,
    Board,
    Cell,
    Row,
    columns,
    group_boards,
    headline,
    interval,
    is_real,
    is_teacher,
    metric_label,
    provenance,
    row_labels,
)
from eval.markup import NOTHING, Markup, join, tag

AXES = {  # cost of a scatter plot: what stands along the axis, how a tick is written
    "nfe": ("network evaluations an image", plots.format_tick),
    "latency": ("seconds an image, alone", plots.format_duration),
}
GroupKey = tuple[tuple[int, ...], int | None, str]  # size, seed and prompts of sample grids
STYLES = 6  # s0 ... s5 in the style sheet


def build_html_page(
    rows: Sequence[Row],
    title: str = "Leaderboard",
    lead: str = "",
    runs: Mapping[str, Path] | None = None,
    failed: Mapping[str, str] | None = None,
) -> str:
    """The page as HTML: a section per board, then sample grids, training curves and failed entries.

    rows: see `tables.validate_rows`. lead: a paragraph under the headline. runs: {name: log.jsonl}. failed: {entry
    without a row: reason}. ValueError for invalid rows or an unreadable log.
    """
    all_boards = group_boards(rows)
    several = len(all_boards) > 1
    training = join(
        tag("<h3>{}</h3>{}", name, plots.training_curves(name, path)) for name, path in (runs or {}).items()
    )
    wrong = join(tag("<dt>{}</dt><dd><pre>{}</pre></dd>", *pair) for pair in (failed or {}).items())
    parts = [tag('<header><p class="kicker">{}</p><h1>{}</h1>', title, headline(all_boards[0]))]
    if lead:
        parts.append(tag('<p class="lead">{}</p>', lead))
    if several:
        tables = (
            f"{len(all_boards)} tables: figures of different protocols, image counts or extractors never share one."
        )
        parts.append(tag('<p class="lead">{}</p>', tables))
    parts.append(tag("</header>"))
    if wrong:
        parts.append(tag('<section class="failed"><h2>Failed</h2><dl>{}</dl></section>', wrong))
    parts += [section(board, i, several) for i, board in enumerate(all_boards)]
    parts.append(sample_grids(rows))
    if training:
        parts.append(tag("<section><h2>Training</h2>{}</section>", training))
    return tag(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        "<style>{}</style></head><body><main>{}</main><script>{}</script></body></html>\n",
        title,
        asset("page.css"),
        join(parts),
        asset("page.js"),
    )


def asset(name: str) -> Markup:
    """The style sheet or the script beside this file."""
    return Markup((Path(__file__).parent / name).read_text())


def section(board: Board, number: int, several: bool) -> Markup:
    """One board: its table, its plots, how its figures were made."""
    heading = tag("{} <small>{}</small>", board.protocol, board.hash) if several else "Figures"
    parts = table(board), legend(board), missing_metrics(board), scatter_plots(board, number), provenance_table(board)
    return tag('<section id="board-{}"><h2>{}</h2>{}<p class="note">{}</p>{}{}{}</section>', number, heading, *parts)


def table(board: Board) -> Markup:
    """The sortable table. Every cell holds its sort key. Real images stay at the foot."""
    of_heading = columns(board)
    first = board.metrics[0] if board.metrics else None
    heads = []
    for heading in of_heading:
        better = board.better(heading) if heading in board.metrics else None
        best = "descending" if better == "higher" or heading == "images/s" else "ascending"
        order = tag(' aria-sort="{}"', best) if heading == first else NOTHING
        arrow = tag(" <i>{} is better</i>", better) if better else NOTHING
        head = best, order, metric_label(heading), arrow
        heads.append(tag('<th scope="col" data-first="{}"{}><button type="button">{}</button>{}</th>', *head))
    lines = []
    for i, row in enumerate((*board.rows, *board.real)):
        cells = join(cell(c[i], heading in board.metrics) for heading, c in of_heading.items() if heading != "model")
        key = of_heading["model"][i].key
        kind = _row_kind(row)
        lines.append(tag('<tr class="{}"><th scope="row" data-key="{}">{}</th>{}</tr>', kind, key, key, cells))
    body = join(lines[: len(board.rows)])
    foot = join(lines[len(board.rows) :])
    return tag(
        '<div class="scroll" tabindex="0" role="region" aria-label="{0}"><table class="sortable">'
        "<caption>Protocol {0}</caption><thead><tr>{1}</tr></thead><tbody>{2}</tbody>{3}</table></div>",
        board.title,
        join(heads),
        body,
        tag("<tfoot>{}</tfoot>", foot) if foot else NOTHING,
    )


def _row_kind(row: Row) -> str:
    if is_real(row):
        return "real"
    return "teacher" if is_teacher(row) else "student"


def cell(cell: Cell, figure: bool) -> Markup:
    """One cell: the figure, its rank, its interval under them."""
    key = NOTHING if cell.key is None else tag(' data-key="{}"', cell.key)
    if not figure or not cell.text:
        return tag("<td{}>{}</td>", key, cell.text or tag("<span class=none>-</span>"))
    kind = " top" if cell.rank == 1 else ""
    tie = " tie" if cell.tie else ""
    rank = tag('<b class="rank{}">{}{}</b>', kind, cell.rank, tie) if cell.rank else NOTHING
    span = tag("<small>{}</small>", cell.span) if cell.span else NOTHING
    return tag('<td{}><span class="figure">{}{}</span>{}</td>', key, rank, cell.text, span)


def legend(board: Board) -> str:
    """The meaning of the marks that occur in a table."""
    marks = [c for cells in columns(board).values() for c in cells]
    words = ["Click a heading to sort."]
    if any(c.rank for c in marks):
        words += ["The number before a figure is its rank: 1 + the number of rows whose entire interval is better."]
    words += ["Rows that share a rank are a tie."] * any(c.tie for c in marks)
    machines = {(r.get("cost") or {}).get("hardware") for r in board.rows} - {None}
    words += [f"Speed and memory were measured on {machines.pop()}."] if len(machines) == 1 else []
    return " ".join(words)


def missing_metrics(board: Board) -> Markup:
    """The metrics that rows lack, with the reasons."""
    rows = [*board.rows, *board.real]
    named = zip(row_labels(rows, board.rows), rows, strict=True)
    words = [f"{name}: {m}, {why}" for name, row in named for m, why in (row.get("left_out") or {}).items()]
    return tag('<p class="note">Left out: {}.</p>', "; ".join(words)) if words else NOTHING


def scatter_plots(board: Board, number: int) -> Markup:
    """Plots of quality against cost for each metric. The script shows the chosen metric; without it, the first.

    Latencies of different machines are in different plots.
    """
    styles = model_styles(board)
    figures: list[Markup] = []
    names: list[str] = []
    for metric in board.metrics:
        drawn = draw_scatter_plots(board, metric, styles).values()
        if drawn:
            hidden = tag(" hidden") if names else NOTHING
            names.append(metric)
            box = join(tag("<figure>{}</figure>", one) for one in drawn)
            figures.append(tag('<div class="plots" data-metric="{}"{}>{}</div>', metric, hidden, box))
    if not names:
        return tag('<p class="note">No row has a metric with a cost beside it, so there is no plot.</p>')
    options = join(tag('<option value="{}">{}</option>', n, metric_label(n)) for n in names)
    choose = tag('<label class="choose">Quality <select>{}</select></label>', options) if len(names) > 1 else NOTHING
    return tag(
        '<div class="quality"><div class="bar"><h3>Quality against cost</h3>{}</div>{}'
        '<p class="note"><span class="key"></span>The Pareto front: nothing cheaper is as good. Bars are the intervals '
        "of the table; rows of one model that differ in steps are joined. Hover over a point for its name.</p></div>",
        choose,
        join(figures),
    )


def model_styles(board: Board) -> dict[str, str]:
    """{model: its class of the style sheet}."""
    models = {str(r["model"]) for r in board.rows if not is_teacher(r)}
    return {model: f"s{i % STYLES}" for i, model in enumerate(sorted(models))}


def draw_scatter_plots(board: Board, metric: str, styles: Mapping[str, str]) -> dict[str, Markup]:
    """{axis: plot} of a metric: against the network calls, and against the latency on each machine.

    A metric without better values has no plot.
    """
    better = board.better(metric)
    if better is None:
        return {}
    named = list(zip(board.rows, row_labels(board.rows, board.rows), strict=True))
    references = [(str(r["model"]), r["metrics"][metric]["value"]) for r in board.real if metric in r["metrics"]]
    reference = references[0] if references else None
    machines = sorted({machine for row in board.rows if (machine := _machine_of_latency(row)) is not None})
    kinds = [("nfe", named, "")]
    for machine in machines:
        mine = [(row, name) for row, name in named if str((row.get("cost") or {}).get("hardware")) == machine]
        kinds.append(("latency", mine, f", on {machine}" if len(machines) > 1 else ""))
    drawn = {}
    for key, rows, more in kinds:
        if points := scatter_points(rows, metric, key, styles):
            name, tick = AXES[key]
            lower = better == "lower"
            drawn[key + more] = plots.scatter(points, lower, name + more, metric_label(metric), reference, tick)
    return drawn


def _machine_of_latency(row: Row) -> str | None:
    """The machine on which the latency of a row was measured; None without one."""
    cost = row.get("cost") or {}
    return str(cost["hardware"]) if cost.get("latency") and cost.get("hardware") is not None else None


def scatter_points(
    named: Sequence[tuple[Row, str]], metric: str, key: str, styles: Mapping[str, str]
) -> list[plots.Point]:
    """The rows, with their labels, that have the metric and the cost."""
    out = []
    for row, name in named:
        cost = row.get("cost") or {}
        if metric not in row["metrics"] or not cost.get(key):
            continue
        figure = row["metrics"][metric]
        low, high = interval(figure)
        style = "teacher" if is_teacher(row) else styles[str(row["model"])]
        series = f"{row['model']} {row.get('guidance')}"
        span = (low, high) if low < high else (None, None)
        out.append(plots.Point(cost[key], figure["value"], name, style, series, *span))
    return out


def provenance_table(board: Board) -> Markup:
    """The provenance of a board: the protocol in full, if this version knows it, and the facts of each row."""
    known = describe_protocol(board.protocol, board.hash)
    lines = []
    rows = [*board.rows, *board.real]
    for row, name in zip(rows, row_labels(rows, board.rows), strict=True):
        origin = dict(provenance(row))
        cost = row.get("cost") or {}
        machine = cost.get("hardware") if any(cost.get(k) for k in COSTS) else None
        counts = [row["metrics"].get(m, {}).get("n") for m in board.metrics]
        facts = [*(origin.get(k) for k in ("seeds", "commit", "hardware")), machine, *counts]
        cells = join(tag("<td>{}</td>", "-" if fact is None else fact) for fact in facts)
        lines.append(tag("<tr><th scope=row>{}</th>{}</tr>", name, cells))
    heads = join(tag('<th scope="col">n of {}</th>', metric_label(m)) for m in board.metrics)
    head = tag(
        '<tr><th scope="col">model</th><th scope="col">seeds</th><th scope="col">commit</th>'
        '<th scope="col">made on</th><th scope="col">speed of</th>{}</tr>',
        heads,
    )
    return tag(
        "<details><summary>How these figures were made: protocol {}, hash {}</summary>{}"
        '<div class="scroll" tabindex="0" role="region" aria-label="provenance"><table>'
        "<thead>{}</thead><tbody>{}</tbody></table></div></details>",
        board.protocol,
        board.hash,
        known,
        head,
        join(lines),
    )


def describe_protocol(name: str, hash_: str) -> Markup:
    """The fields of a protocol, if this version has it with the same hash."""
    from dataclasses import asdict

    from eval.protocols import PROTOCOLS

    protocol = PROTOCOLS.get(name)
    if protocol is None or protocol.hash != hash_:
        why = (
            "is none that this version knows"
            if protocol is None
            else f"is {protocol.hash} in this version: they differ"
        )
        return tag('<p class="note">Protocol {}, hash {}, {}.</p>', name, hash_, why)
    fields = {k: v for k, v in asdict(protocol).items() if v not in (None, "", (), [])}
    written = lambda v: v if isinstance(v, str) else json.dumps(v, indent=1)
    return tag("<dl>{}</dl>", join(tag("<dt>{}</dt><dd>{}</dd>", k, written(v)) for k, v in fields.items()))


def sample_grids(rows: Sequence[Row]) -> Markup:
    """Grids of the rows' folders. Grids with the same prompts, labels and noise stand under one heading.

    Folders that are absent or cannot be read are listed.
    """
    groups: dict[GroupKey, list[Markup]] = {}
    absent: list[str] = []
    broken: list[str] = []
    visited: set[str] = set()
    for row, name in zip(rows, row_labels(rows, rows), strict=True):
        folder = row.get("samples")
        if not folder or folder in visited:
            continue
        visited.add(folder)
        if not Path(str(folder)).is_dir():
            absent.append(f"{name} ({folder})")
            continue
        try:
            key, figure = _sample_figure(row, name)
        except ValueError as error:
            broken.append(f"{name} ({error})")
            continue
        groups.setdefault(key, []).append(figure)
    parts = [_grid_group(seed, figures) for (_, seed, _), figures in groups.items()]
    if absent:
        parts.append(tag('<p class="note">Not on this machine: {}.</p>', "; ".join(absent)))
    if broken:
        parts.append(tag('<p class="note">Not readable: {}.</p>', "; ".join(broken)))
    return tag("<section><h2>Samples</h2>{}</section>", join(parts)) if parts else NOTHING


def _sample_figure(row: Row, name: str) -> tuple[GroupKey, Markup]:
    """((size, seed, prompts), the grid of a row's folder). ValueError for a folder that cannot be read."""
    from eval.images import images as folders

    images, labels, manifest = folders.read_folder(str(row["samples"]), first=120)
    size = tuple(images.shape[-2:])
    nfe = (row.get("cost") or {}).get("nfe") or manifest.get("nfe")
    cost = f"{nfe} network call{'s' * (nfe != 1)}" if nfe else ""
    large = max(size) > 64
    picture = plots.image_grid(images[:8], None, columns=4) if large else plots.image_grid(images, labels)
    style = NOTHING if large else tag(" class=pixels")
    figure = tag(
        '<figure><figcaption><b>{}</b><span>{}</span></figcaption><img src="{}" alt="{}"{}></figure>',
        name,
        cost,
        picture,
        f"samples of {name}",
        style,
    )
    prompts = manifest.get("prompts") or str(manifest.get("labels"))
    return (size, manifest.get("seed"), str(prompts)), figure


def _grid_group(seed: int | None, figures: Sequence[Markup]) -> Markup:
    """Grids of one size, seed and prompts under one heading."""
    noise = "of unknown noise" if seed is None else f"of seed {seed}"
    several = len(figures) > 1 and seed is not None
    same = "The same prompts and the same noise at the same place of every grid, " if several else ""
    note = f"{same}{noise}, not selected."
    return tag('<p class="note">{}</p><div class="grids">{}</div>', note[0].upper() + note[1:], join(figures))
