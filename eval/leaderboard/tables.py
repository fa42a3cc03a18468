"""Rows of figures -> tables of comparable figures, in the terminal, in Markdown and on one page.

A row is what `eval.score` writes: model, steps, guidance, protocol, protocol_hash, n, seeds, extractor, extractor_hash,
commit, hardware, metrics {name: {value, low, high, n}}, cost {nfe, latency, ...}, samples (a folder). kind is teacher,
pipeline, lora, or real: real images, which have no rank and are a dashed line in the plots.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median_low
from typing import TYPE_CHECKING, Any

from eval.files import shorten
from eval.images.manifest import LARGEST, is_count, is_finite, is_number
from eval.leaderboard import plots
from pipelines.markdown import escape_markdown

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
Figure = Mapping[str, Any]  # value, low, high, n
Cost = Mapping[str, Any]  # see COSTS
LOWER = ("fid", "kid", "fd", "cmmd", "mmd", "frechet", "distance", "off", "hallucination", "loss")  # is better
ACRONYMS = ("fid", "kid", "fd", "cmmd", "is", "clip", "lpips", "dino", "ssim", "psnr")


def _format_rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _format_memory(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


COSTS: dict[str, tuple[str, Callable[[float], str]]] = {  # key of "cost": heading, how it is written
    "nfe": ("calls", lambda v: f"{v:,.0f}"),
    "latency": ("latency", plots.format_duration),
    "images_per_second": ("images/s", _format_rate),
    "parameters": ("parameters", lambda v: plots.format_tick(float(f"{v:.3g}"))),
    "peak_memory": ("peak memory", _format_memory),
    "train_seconds": ("training", plots.format_duration),
}
MADE = ("runs", "seeds", "commit", "hardware")  # of a row; protocol, n and extractor are those of its table


def lower_is_better(metric: str) -> bool:
    """Whether lower values of a metric are better, by a word of its name, such as fid in patch_fid."""
    return any(word in LOWER for word in metric.lower().replace("-", "_").split("_"))


def better_values(metric: str, rows: Iterable[Row]) -> str | None:
    """Which values of a metric are better, lower or higher: as its figures say, else by its name; None: neither."""
    stated = next((row["metrics"][metric].get("better") for row in rows if metric in row["metrics"]), None)
    if stated is not None:
        return None if stated == "neither" else str(stated)
    return "lower" if lower_is_better(metric) else "higher"


def metric_label(metric: str) -> str:
    """A metric's name for people: fd_heldout -> FD held-out, patch_fid -> patch FID."""
    words = metric.replace("heldout", "held-out").split("_")
    return " ".join(w.upper() if w in ACRONYMS else w for w in words)


@dataclass(frozen=True)
class Board:
    """Comparable rows: of one protocol (by its hash), one n and one extractor (by its hash)."""

    protocol: str
    hash: str
    n: int | None
    extractor: str
    extractor_hash: str
    rows: list[Row]  # the best of the first metric first
    real: list[Row]  # of real images: no rank

    @cached_property
    def metrics(self) -> list[str]:
        """The names of the metrics, in the order of the rows."""
        return list(dict.fromkeys(name for row in (*self.rows, *self.real) for name in row["metrics"]))

    @property
    def headline_metric(self) -> str | None:
        """The first metric that has better values."""
        return next((name for name in self.metrics if self.better(name)), None)

    @property
    def title(self) -> str:
        """The protocol, n and the extractor."""
        return self.title_by(str)

    def title_by(self, write: Callable[[str], str]) -> str:
        """`title`, its parts written by `write`."""
        count = f", n = {self.n:,}" if self.n else ""
        net = f", extractor {write(f'{self.extractor} {self.extractor_hash}')}".rstrip() if self.extractor else ""
        untrained = " (untrained: no measure of quality)" if "random:" in self.extractor else ""
        return f"{write(self.protocol)} [{write(self.hash)}]{count}{net}{untrained}"

    def better(self, metric: str) -> str | None:
        """Which values of a metric are better, lower or higher; None: neither, and there are no ranks."""
        return better_values(metric, (*self.rows, *self.real))

    def rank_rows(self, metric: str) -> dict[int, tuple[int, bool]]:
        """{row's number: (rank, whether another row shares it: a tie)}.

        The rank is 1 + the number of rows whose entire interval is better than this one's. So rows with equal rank
        overlap; in a chain of overlapping intervals the two ends can still differ in rank. A row
        without an interval is its value alone. Without better values there are no ranks.
        """
        better = self.better(metric)
        if better is None:
            return {}
        sign = 1 if better == "lower" else -1
        figures = {i: row["metrics"][metric] for i, row in enumerate(self.rows) if metric in row["metrics"]}
        spans = {i: sorted(sign * v for v in interval(m)) for i, m in figures.items()}
        ends = sorted(high for _, high in spans.values())
        ranks = {i: 1 + bisect_left(ends, low) for i, (low, _) in spans.items()}
        shared = Counter(ranks.values())
        return {i: (rank, shared[rank] > 1) for i, rank in ranks.items()}


def interval(metric: Figure) -> tuple[float, float]:
    """(low, high) of a figure; (value, value) without an interval."""
    value = metric["value"]
    low, high = (value if metric.get(k) is None else metric[k] for k in ("low", "high"))
    return low, high


def _is_cost(value: object) -> bool:
    """Whether a number may stand on a logarithmic axis, or is 0."""
    return isinstance(value, int | float) and is_number(value) and (value == 0 or value >= 1 / LARGEST)


def _is_plain(value: object) -> bool:
    return isinstance(value, str) or is_finite(value)


def _are_plain(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_plain, value))


def _are_seeds(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(seed) is int for seed in value)


def _are_reasons(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(word, str) for pair in value.items() for word in pair)


TEXTS = ("model", "kind", "scheduler", "protocol", "protocol_hash", "extractor", "extractor_hash", "images", "commit",
         "hardware", "samples", "run", "model_hash")  # fmt: skip
SCHEMA: dict[str, tuple[Callable[[object], bool], str]] = {  # of a row: (its check, what it must be); null is allowed
    **dict.fromkeys(TEXTS, (_is_plain, "text or a number")),
    "runs": (_are_plain, "a list of names or numbers"),
    "seeds": (_are_seeds, "a list of whole numbers"),
    "steps": (is_number, "a finite number, at least 0"),
    "guidance": (is_finite, "a finite number"),
    "n": (is_count, "a number of images"),
    "cost": (lambda value: isinstance(value, dict), "names with values"),
    "left_out": (_are_reasons, "names of metrics with reasons"),
}


def validate_rows(rows: object, source: str = "the rows") -> list[Row]:
    """The same rows. ValueError that names the first row which is not as `eval.score` writes it."""
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{source} hold no list of rows; make them with python -m eval.score")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict) or row.get("model") is None:
            raise ValueError(f"{source}: row {i} has no model or no metrics; score its folder again")
        if (fault := _row_error(row)) is not None:
            raise ValueError(f"{source}: row {i}, {shorten(row['model'])}: {fault}")
    return rows


def _row_error(row: Row) -> str | None:
    """The fault of a row with a model and metrics, and its remedy; None if it is valid."""
    for key, (is_valid, kind) in SCHEMA.items():
        if row.get(key) is not None and not is_valid(row[key]):
            return f"{key} is {shorten(row[key])}; it must be {kind}. Score it again"
    for name, metric in row["metrics"].items():
        if (fault := _figure_error(metric)) is not None:
            return f"{name} {fault}; score it again"
    for name, value in (row.get("cost") or {}).items():
        is_valid = _is_cost if name in COSTS else _is_plain
        if value is not None and not is_valid(value):
            return f"cost {name} must be a finite number, at least 0; measure it again"
    return None


def _figure_error(metric: object) -> str | None:
    """The fault of a figure in a row; None if it is valid."""
    if not isinstance(metric, dict) or not is_finite(metric.get("value")):
        return "has no finite value"
    if wrong := [key for key in ("low", "high") if metric.get(key) is not None and not is_finite(metric[key])]:
        return f"has no finite value for the {wrong[0]} of its interval"
    if metric.get("n") is not None and not is_count(metric["n"]):
        return f"has n {shorten(metric['n'])}, not a number of images"
    if metric.get("better") not in (None, "lower", "higher", "neither"):
        return f"has better values {shorten(metric['better'])}, not lower, higher or neither"
    low, high = interval(metric)
    rounding = 1e-9 * max(abs(low), abs(high))
    if not low - rounding <= metric["value"] <= high + rounding:
        return f"has the interval {low} to {high} without its value {metric['value']}"
    return None


SAME = ("model", "kind", "steps", "guidance", "scheduler", "protocol", "protocol_hash", "n", "extractor_hash")


def drop_duplicates(rows: Iterable[Row]) -> list[Row]:
    """The rows without duplicates, such as one row read from two files."""
    return list({json.dumps(row, sort_keys=True): row for row in rows}.values())


def average_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row for rows that differ in their seeds alone: means, with Student's 95 % interval over the seeds.

    "run" of a row, where it has one, is the training run of its model. Values of one run count once, by their mean, and
    the interval is over runs. A figure's n is then the number of its values. If some rows lack a metric, the mean is
    over the others. ValueError for two different rows of one seed: they are not independent.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in drop_duplicates(rows):
        weights = None if "run" in row else row.get("model_hash")  # rows of several runs are of several networks
        groups.setdefault((weights, *(json.dumps(row.get(key)) for key in SAME)), []).append(row)
    return [group[0] if len(group) == 1 else _average_group(group) for group in groups.values()]


def _average_group(group: Sequence[Row]) -> Row:
    """The mean of two or more rows that differ in their seeds alone."""
    first = group[0]
    counts = Counter((row.get("run"), tuple(row["seeds"])) for row in group if row.get("seeds"))
    if repeated := [seeds for (_, seeds), count in counts.items() if count > 1]:
        raise ValueError(f"{first['model']} has two rows of seed {repeated[0][0]}: remove one, or give it another name")
    names = dict.fromkeys(name for row in group for name in row["metrics"])
    mean = {**first, "metrics": {name: _average_figure(group, name) for name in names}, "cost": _average_cost(group)}
    mean["seeds"] = sorted({seed for row in group for seed in row.get("seeds") or []})
    if "run" in first:
        mean["runs"] = sorted({row["run"] for row in group if "run" in row})
    return mean


def _average_figure(group: Sequence[Row], name: str) -> dict[str, float | str]:
    """The mean of a metric over seeds or runs: value, n and, for two or more, low and high."""
    from eval.metrics.intervals import mean_ci

    values: dict[object, list[float]] = {}
    for i, row in enumerate(group):
        if name in row["metrics"]:
            values.setdefault(row.get("run", i), []).append(row["metrics"][name]["value"])
    nested = list(values.values())
    figure: dict[str, float | str] = {"value": fmean(map(fmean, nested)), "n": sum(map(len, nested))}
    stated = next((row["metrics"][name].get("better") for row in group if name in row["metrics"]), None)
    if stated is not None:
        figure["better"] = stated
    if len(nested) > 1:
        interval_of_mean = mean_ci(nested)
        figure |= {"low": interval_of_mean.low, "high": interval_of_mean.high}
    return figure


def _average_cost(group: Sequence[Row]) -> Cost:
    """The cost of the first row, with the means of the numbers that rows have."""
    costs = [row.get("cost") or {} for row in group]
    mean = dict(costs[0])
    for key in COSTS:
        numbers = [cost[key] for cost in costs if cost.get(key) is not None]
        if numbers:
            mean[key] = numbers[0] if len(set(numbers)) == 1 else fmean(numbers)  # an integer stays one
    return mean


def group_boards(rows: Sequence[Row]) -> list[Board]:
    """Boards of comparable rows, in the order of their first rows."""
    keys = ("protocol", "protocol_hash", "n", "extractor", "extractor_hash")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in validate_rows(rows):
        groups.setdefault(tuple(row.get(k) for k in keys), []).append(row)
    out = []
    for (protocol, hash_, n, extractor, extractor_hash), group in groups.items():
        order = _order_rows(group)
        models, real = ([r for r in order if is_real(r) is kind] for kind in (False, True))
        net = str(extractor or ""), str(extractor_hash or "")
        out.append(Board(str(protocol or "no protocol"), str(hash_ or "no hash"), n, *net, models, real))
    return out


def _order_rows(group: Sequence[Row]) -> list[Row]:
    """Rows by the first metric that has better values, the best first; rows without it last."""
    first = next((name for name in group[0]["metrics"] if better_values(name, group)), None)
    if first is None:
        return list(group)
    sign = 1 if better_values(first, group) == "lower" else -1
    worth = {id(row): sign * row["metrics"][first]["value"] for row in group if first in row["metrics"]}
    return sorted(group, key=lambda row: worth.get(id(row), math.inf))


def is_teacher(row: Row) -> bool:
    """Whether a row is a teacher's: by its "kind", else by the model's name."""
    return row["kind"] == "teacher" if row.get("kind") else str(row["model"]).lower().startswith("teacher")


def is_real(row: Row) -> bool:
    """Whether a row's images are real ones."""
    return row.get("kind") == "real"


def real_images_row(like: Row, name: str, **metrics: float) -> Row:
    """A row of real images with the protocol of `like`: the figures of a perfect model."""
    keys = ("protocol", "protocol_hash", "n", "extractor", "extractor_hash")
    figures = {key: {"value": value} for key, value in metrics.items()}
    return {"model": name, "kind": "real", **{key: like.get(key) for key in keys}, "metrics": figures}


def row_label(row: Row, rows: Iterable[Row]) -> str:
    """The model's name, with steps, guidance and weights if rows of that name differ in them."""
    return row_labels([row], rows)[0]


def row_labels(some: Iterable[Row], rows: Iterable[Row]) -> list[str]:
    """`row_label` of some rows, in one pass over all rows."""
    keys = ("steps", "guidance", "model_hash")
    values: dict[str, defaultdict[str, set[object]]] = {key: defaultdict(set) for key in keys}
    for row in rows:
        for key, of_model in values.items():
            of_model[row["model"]].add(row.get(key))
    out = []
    for row in some:
        parts = [str(row["model"])]
        model = row["model"]
        if len(values["steps"][model]) > 1:
            parts.append(f"{row.get('steps')} step{'s' if row.get('steps') != 1 else ''}")
        if len(values["guidance"][model]) > 1:
            guidance = row.get("guidance")
            parts.append("own guidance" if guidance is None else f"guidance {guidance:g}")
        if len(values["model_hash"][model] - {None}) > 1:
            parts.append(f"weights {str(row.get('model_hash') or 'unknown')[:6]}")
        out.append(", ".join(parts))
    return out


def count_decimals(board: Board, metric: str) -> int:
    """The number of decimals that gives the median figure of a column three digits."""
    values = [abs(r["metrics"][metric]["value"]) for r in board.rows if metric in r["metrics"]]
    middle = median_low([v for v in values if v > 0] or [1.0])
    return min(6, max(0, 2 - math.floor(math.log10(middle))))


@dataclass(frozen=True)
class Cell:
    """A cell of a table: the figure, its interval, its rank and its sort key."""

    text: str = ""
    span: str = ""
    rank: int = 0
    tie: bool = False
    key: float | str | None = None

    def __str__(self) -> str:
        rank = f"#{self.rank}{' tie' * self.tie}" if self.rank else ""
        return " ".join(filter(None, (self.text, self.span and f"({self.span})", rank)))


def columns(board: Board) -> dict[str, list[Cell]]:
    """Heading -> a cell for each row, those of real images last. Columns without a value are left out."""
    rows = [*board.rows, *board.real]
    out: dict[str, list[Cell]] = {"model": [Cell(str(row["model"]), key=str(row["model"])) for row in rows]}
    for key, default in (("steps", [None]), ("guidance", [None, 0, 1])):
        if any(row.get(key) not in default for row in rows):
            out[key] = [_number_cell(row.get(key), "{:g}".format) for row in rows]
    for name in board.metrics:
        ranks = board.rank_rows(name)
        places = count_decimals(board, name)
        out[name] = [_figure(row["metrics"].get(name), places, ranks.get(i)) for i, row in enumerate(rows)]
    return out | _cost_columns([row.get("cost") or {} for row in rows])


def _cost_columns(costs: Sequence[Cost]) -> dict[str, list[Cell]]:
    """The columns of costs, and of the machines where speeds were measured on several."""
    out: dict[str, list[Cell]] = {}
    for key, (heading, write) in COSTS.items():
        if any(cost.get(key) is not None for cost in costs):
            out[heading] = [_number_cell(cost.get(key), write) for cost in costs]
    machines = [_machine_of_speed(cost) for cost in costs]
    if len({machine for machine in machines if machine}) > 1:  # speeds share a column only beside their machines
        out["measured on"] = [Cell(machine or "", key=machine) for machine in machines]
    return out


def _number_cell(value: float | None, write: Callable[[float], str]) -> Cell:
    return Cell() if value is None else Cell(write(value), key=value)


def _machine_of_speed(cost: Cost) -> str | None:
    """The machine on which a latency or a rate was measured; None without one."""
    return cost.get("hardware") if cost.get("latency") or cost.get("images_per_second") else None


def _figure(metric: Figure | None, places: int, rank: tuple[int, bool] | None) -> Cell:
    if metric is None:
        return Cell()
    low, high = interval(metric)
    span = f"{low:.{places}f} to {high:.{places}f}" if low < high else ""
    place, tie = rank or (0, False)
    return Cell(f"{metric['value']:.{places}f}", span, place, tie, metric["value"])


def headline(board: Board) -> str:
    """One sentence on the first metric of a board: the student of fewest calls against its teacher, else the leader."""
    if not board.rows or not board.metrics:
        return "Real images alone: there is no model to compare."
    name = board.headline_metric
    if name is None:
        return f"{board.protocol}: no figure says which model is better."
    called = [row for row in board.rows if name in row["metrics"] and _network_calls(row)]
    students = [row for row in called if not is_teacher(row)]
    teachers = [row for row in called if is_teacher(row)]
    if not students or not teachers:
        return _describe_leader(board, name)
    fewest = min(map(_network_calls, students))
    among = [row for row in students if _network_calls(row) == fewest]
    return _compare_with_teacher(board, name, among, max(teachers, key=_network_calls))


def _network_calls(row: Row) -> float:
    return (row.get("cost") or {}).get("nfe") or 0


def _describe_leader(board: Board, name: str) -> str:
    number, leader = next((i, row) for i, row in enumerate(board.rows) if name in row["metrics"])
    ranks = board.rank_rows(name)
    rank, shared = ranks[number]
    tied = sum(other == (rank, shared) for other in ranks.values()) - 1 if shared else 0
    tie = f", a tie with {tied} other{'s' * (tied > 1)}" if tied else ""
    value = f"{leader['metrics'][name]['value']:.{count_decimals(board, name)}f}"
    return f"{row_label(leader, board.rows)} leads {board.protocol} with {metric_label(name)} {value}{tie}."


def _compare_with_teacher(board: Board, name: str, students: Sequence[Row], teacher: Row) -> str:
    """The first of the students, which call their networks equally often, and the teacher."""
    places = count_decimals(board, name)
    best = students[0]
    calls = _network_calls(best)
    which = f", the best of {len(students)} students," if len(students) > 1 else ""
    (low, high), (teacher_low, teacher_high) = (interval(row["metrics"][name]) for row in (best, teacher))
    tie = ": a tie" if low <= teacher_high and teacher_low <= high else ""
    unit = "network calls" if calls > 1 else "network call"
    return (
        f"With {calls} {unit} an image, {best['model']}{which} has {metric_label(name)} "
        f"{best['metrics'][name]['value']:.{places}f}; its teacher has {teacher['metrics'][name]['value']:.{places}f} "
        f"with {_network_calls(teacher)}{tie}."
    )


def terminal_tables(rows: Sequence[Row]) -> list[Table]:
    """A rich table for each board, 80 columns wide: figures, the first with its rank, calls and latency."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = []
    for board in group_boards(rows):
        one = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=Text(board.title))
        one.title_justify = "left"
        of_heading = columns(board)
        for name in ("images/s", "parameters", "peak memory", "training"):
            of_heading.pop(name, None)
        for heading in of_heading:
            justify: Any = "left" if heading == "model" else "right"
            words = [w if len(w) < 9 else f"{w[:5]}-\n{w[5:]}" for w in metric_label(heading).split()]
            one.add_column("\n".join(words), justify=justify, no_wrap=True)
        for i, row in enumerate((*board.rows, *board.real)):
            cells = []
            for heading, column in of_heading.items():
                rank = f" ({column[i].rank})" if column[i].rank and heading == board.metrics[0] else ""
                cells.append(column[i].text + rank)
            one.add_row(*map(Text, cells), style=_row_style(row))
        one.caption = "(1) is the rank: 1 + the number of rows whose entire interval is better"
        one.caption_justify = "left"
        out.append(one)
    return out


def _row_style(row: Row) -> str | None:
    """The style of a row in the terminal: real images dim, students bold."""
    if is_real(row):
        return "dim"
    return None if is_teacher(row) else "bold"


def markdown_tables(rows: Sequence[Row]) -> str:
    """A Markdown table for each board: value (low to high) #rank, with "tie" if others share it, and the provenance.

    Text of rows is escaped: it becomes neither HTML nor Markdown.
    """
    parts = []
    for board in group_boards(rows):
        of_heading = columns(board)
        rows = [*board.rows, *board.real]
        lines = [
            f"## {board.title_by(escape_markdown)}",
            "",
            f"| {' | '.join(escape_markdown(metric_label(heading)) for heading in of_heading)} |",
            "|---|" + "---:|" * (len(of_heading) - 1),
        ]
        for i in range(len(rows)):
            lines.append(f"| {' | '.join(escape_markdown(cells[i]) for cells in of_heading.values())} |")
        origins: dict[str, list[str]] = {}
        for row, name in zip(rows, row_labels(rows, board.rows), strict=True):
            how = "; ".join(f"{k} {escape_markdown(v)}" for k, v in provenance(row))
            origins.setdefault(how, []).append(escape_markdown(name))
        lines += ["", *(f"- {', '.join(names)}: {how}" for how, names in origins.items() if how)]
        parts.append("\n".join(lines).rstrip() + "\n")
    note = "Rank = 1 + the number of rows whose entire interval is better. A table holds figures of one protocol.\n"
    return "\n".join([*parts, note])


def provenance(row: Row) -> list[tuple[str, str]]:
    """The provenance of a row's figures that its table does not show."""
    words = lambda value: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return [(key, words(row[key])) for key in MADE if row.get(key) is not None]
