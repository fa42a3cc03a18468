"""Rows of figures -> tables that compare only what is comparable: in the terminal, in Markdown, on one page.

A row is what `eval.score` writes: model, steps, guidance, protocol, protocol_hash, n, seeds, extractor, extractor_hash,
commit, hardware, metrics {name: {value, low, high, n}}, cost {nfe, latency, ...}, samples (a folder). kind is teacher,
pipeline, lora, or real: real images, which have no rank and are a dashed line in the plots.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median_low
from typing import TYPE_CHECKING, Any

from eval import plots

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
LOWER = ("fid", "kid", "fd", "cmmd", "mmd", "frechet", "distance", "off", "hallucination", "loss")  # is better
ACRONYMS = ("fid", "kid", "fd", "cmmd", "is", "clip", "lpips", "dino", "ssim", "psnr")
COSTS = {  # key of "cost": heading, how it is written
    "nfe": ("calls", lambda v: f"{v:,.0f}"),
    "latency": ("latency", plots.duration),
    "images_per_second": ("images/s", lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}"),
    "parameters": ("parameters", lambda v: plots.short(float(f"{v:.3g}"))),
    "peak_memory": ("peak memory", lambda v: f"{v / 2**30:.2f} GiB" if v >= 2**30 else f"{v / 2**20:.0f} MiB"),
    "train_seconds": ("training", plots.duration),
}
MADE = ("runs", "seeds", "commit", "hardware")  # of a row; protocol, n and extractor are those of its table


def lower(metric: str) -> bool:
    """Whether less of a metric is better; by a word of its name, such as fid in patch_fid."""
    return any(word in LOWER for word in metric.lower().replace("-", "_").split("_"))


def pretty(metric: str) -> str:
    """A metric's name for people: fd_heldout -> FD held-out, patch_fid -> patch FID."""
    words = metric.replace("heldout", "held-out").split("_")
    return " ".join(w.upper() if w in ACRONYMS else w for w in words)


@dataclass(frozen=True)
class Board:
    """Rows that may share a column: one protocol (by its hash), one n, one extractor (by its hash)."""

    protocol: str
    hash: str
    n: int | None
    extractor: str
    extractor_hash: str
    rows: list[Row]  # the best of the first metric first
    real: list[Row]  # of real images: no rank

    @property
    def metrics(self) -> list[str]:
        """Names, in the order in which rows have them."""
        return list(dict.fromkeys(name for row in (*self.rows, *self.real) for name in row["metrics"]))

    @property
    def title(self) -> str:
        """The protocol and what else a figure depends on."""
        count = f", n = {self.n:,}" if self.n else ""
        net = f", extractor {self.extractor} {self.extractor_hash}".rstrip() if self.extractor else ""
        return f"{self.protocol} [{self.hash}]{count}{net}"

    def ranks(self, metric: str) -> dict[int, tuple[int, bool]]:
        """{row's number: (rank, whether another row shares it: a tie)}.

        The rank is one more than the number of rows that are surely better: whose whole interval is better than this
        one's. So rows of one rank overlap, and of a chain of overlapping intervals the ends have different ranks. A row
        without an interval is its value alone.
        """
        sign = 1 if lower(metric) else -1
        found = {i: row["metrics"][metric] for i, row in enumerate(self.rows) if metric in row["metrics"]}
        spans = {i: sorted(sign * v for v in interval(m)) for i, m in found.items()}
        ranks = {i: 1 + sum(high < low for _, high in spans.values()) for i, (low, _) in spans.items()}
        return {i: (rank, [*ranks.values()].count(rank) > 1) for i, rank in ranks.items()}


def interval(metric: Mapping[str, Any]) -> tuple[float, float]:
    """(low, high) of a figure; its value twice where it has no interval."""
    value = metric["value"]
    low, high = (value if metric.get(k) is None else metric[k] for k in ("low", "high"))
    return low, high


def checked(rows: Any, source: str = "the rows") -> list[Row]:
    """Rows as they are used here; ValueError names the first that is not as `eval.score` writes it."""
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{source} hold no list of rows; make them with python -m eval.score")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict) or "model" not in row:
            raise ValueError(f"{source}: row {i} has no model or no metrics; score its folder again")
        for name, metric in row["metrics"].items():
            values = [metric.get(k) for k in ("value", "low", "high")] if isinstance(metric, dict) else [None]
            if values[0] is None or not all(v is None or math.isfinite(v) for v in values):
                raise ValueError(f"{source}: row {i}, {row['model']!r}: {name} is no finite value; score it again")
        for name, value in (row.get("cost") or {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{source}: row {i}, {row['model']!r}: cost {name} is not finite; measure it again")
    return rows


SAME = ("model", "kind", "steps", "guidance", "scheduler", "protocol", "protocol_hash", "n", "extractor_hash")


def mean(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in their seeds alone, as one: means, with Student's 95 % interval over the seeds.

    "run" of a row, where it has one, is the training run of its model: values of one run count once, by their mean, and
    the interval is over runs. A figure's n is then the number of its values.
    """
    from eval.intervals import mean_ci

    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(json.dumps(row.get(key)) for key in SAME), []).append(row)
    out: list[Row] = []
    for group in groups.values():
        first, metrics, cost = group[0], {}, dict(group[0].get("cost") or {})
        if len(group) == 1:
            out.append(first)
            continue
        for name in first["metrics"]:
            values: dict[Any, list[float]] = {}
            for i, row in enumerate(group):
                values.setdefault(row.get("run", i), []).append(row["metrics"][name]["value"])
            nested = list(values.values())
            figure = {"value": fmean(map(fmean, nested)), "n": sum(map(len, nested))}
            if len(nested) > 1:
                found = mean_ci(nested)
                figure |= {"low": found.low, "high": found.high}
            metrics[name] = figure
        for key in COSTS:
            measured = [c[key] for c in (row.get("cost") or {} for row in group) if c.get(key) is not None]
            same = len(set(measured)) == 1  # an integer stays one
            cost |= {key: measured[0] if same else fmean(measured)} if measured else {}
        seeds = sorted({seed for row in group for seed in row.get("seeds") or []})
        runs = {"runs": sorted({row["run"] for row in group if "run" in row})} if "run" in first else {}
        out.append({**first, "metrics": metrics, "cost": cost, "seeds": seeds, **runs})
    return out


def boards(rows: Sequence[Row]) -> list[Board]:
    """The rows by what makes figures comparable, in the order of their first rows."""
    keys = ("protocol", "protocol_hash", "n", "extractor", "extractor_hash")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in checked(rows):
        groups.setdefault(tuple(row.get(k) for k in keys), []).append(row)
    out = []
    for (protocol, hash_, n, extractor, extractor_hash), group in groups.items():
        first = next(iter(group[0]["metrics"]), None)
        sign = 1 if lower(first or "") else -1
        worth = {id(r): sign * r["metrics"][first]["value"] for r in group if first in r["metrics"]}
        order = sorted(group, key=lambda r, worth=worth: worth.get(id(r), math.inf))  # type: ignore[misc]
        models, real = ([r for r in order if is_real(r) is kind] for kind in (False, True))
        net = str(extractor or ""), str(extractor_hash or "")
        out.append(Board(str(protocol or "no protocol"), str(hash_ or "no hash"), n, *net, models, real))
    return out


def is_teacher(row: Row) -> bool:
    """By the row's "kind" where it has one, else by the model's name."""
    return row["kind"] == "teacher" if row.get("kind") else str(row["model"]).lower().startswith("teacher")


def is_real(row: Row) -> bool:
    """Whether a row's images are real ones."""
    return row.get("kind") == "real"


def real(like: Row, name: str, **metrics: float) -> Row:
    """A row of real images beside those of `like`'s protocol: what a perfect model would have."""
    keys = ("protocol", "protocol_hash", "n", "extractor", "extractor_hash")
    figures = {key: {"value": value} for key, value in metrics.items()}
    return {"model": name, "kind": "real", **{key: like.get(key) for key in keys}, "metrics": figures}


def label(row: Row, rows: Iterable[Row]) -> str:
    """The model, with steps and guidance where another row of that model has others."""
    same = [r for r in rows if r["model"] == row["model"]]
    parts = [str(row["model"])]
    if len({r.get("steps") for r in same}) > 1:
        parts.append(f"{row.get('steps')} step{'s' if row.get('steps') != 1 else ''}")
    if len({r.get("guidance") for r in same}) > 1:
        parts.append(f"guidance {row.get('guidance'):g}")
    return ", ".join(parts)


def digits(board: Board, metric: str) -> int:
    """Decimals that give the middle figure of a column three digits."""
    values = [abs(r["metrics"][metric]["value"]) for r in board.rows if metric in r["metrics"]]
    middle = median_low([v for v in values if v > 0] or [1.0])
    return min(6, max(0, 2 - math.floor(math.log10(middle))))


@dataclass(frozen=True)
class Cell:
    """What a column shows of a row: the figure, its interval, its rank; key sorts."""

    text: str = ""
    span: str = ""
    rank: int = 0
    tie: bool = False
    key: float | str | None = None

    def __str__(self) -> str:
        rank = f"#{self.rank}{' tie' if self.tie else ''}" if self.rank else ""
        return " ".join(filter(None, (self.text, self.span and f"({self.span})", rank)))


def columns(board: Board) -> dict[str, list[Cell]]:
    """Heading -> a cell a row (then those of real images); only columns in which something stands."""
    rows = [*board.rows, *board.real]
    out: dict[str, list[Cell]] = {"model": [Cell(str(r["model"]), key=str(r["model"])) for r in rows]}
    for key in ("steps", "guidance"):
        plain = [None, 0, 1] if key == "guidance" else [None]
        if any(r.get(key) not in plain for r in rows):
            out[key] = [Cell() if r.get(key) is None else Cell(f"{r[key]:g}", key=r[key]) for r in rows]
    for name in board.metrics:
        ranks, places = board.ranks(name), digits(board, name)
        out[name] = [_figure(r["metrics"].get(name), places, ranks.get(i)) for i, r in enumerate(rows)]
    costs = [r.get("cost") or {} for r in rows]
    for key, (heading, text) in COSTS.items():
        if any(c.get(key) is not None for c in costs):
            out[heading] = [Cell() if c.get(key) is None else Cell(text(c[key]), key=c[key]) for c in costs]
    machines = [c.get("hardware") if c.get("latency") or c.get("images_per_second") else None for c in costs]
    if len({m for m in machines if m}) > 1:  # speeds of two machines share a column only beside their names
        out["measured on"] = [Cell(m or "", key=m) for m in machines]
    return out


def _figure(metric: Mapping[str, Any] | None, places: int, rank: tuple[int, bool] | None) -> Cell:
    if metric is None:
        return Cell()
    low, high = interval(metric)
    span = f"{low:.{places}f} to {high:.{places}f}" if low < high else ""
    place, tie = rank or (0, False)
    return Cell(f"{metric['value']:.{places}f}", span, place, tie, metric["value"])


def headline(board: Board) -> str:
    """What a board says of its first metric, in one sentence."""
    if not board.rows or not board.metrics:
        return "Real images alone: there is no model to compare."
    name = board.metrics[0]
    scored = [(i, r) for i, r in enumerate(board.rows) if name in r["metrics"]]
    ranks, places = board.ranks(name), digits(board, name)
    value = lambda row: f"{row['metrics'][name]['value']:.{places}f}"
    calls = lambda row: (row.get("cost") or {}).get("nfe")
    students = [(i, r) for i, r in scored if not is_teacher(r) and calls(r)]
    teachers = [(i, r) for i, r in scored if is_teacher(r) and calls(r)]
    if not students or not teachers:
        i, best = scored[0]
        tied = sum(rank == ranks[i] for rank in ranks.values()) - 1 if ranks[i][1] else 0
        more = f", a tie with {tied} other{'s' if tied > 1 else ''}" if tied else ""
        return f"{label(best, board.rows)} leads {board.protocol} with {pretty(name)} {value(best)}{more}."
    fewest = min(calls(r) for _, r in students)
    among = [(i, r) for i, r in students if calls(r) == fewest]
    (_, best), (_, slow) = among[0], max(teachers, key=lambda pair: calls(pair[1]))
    which = f", the best of {len(among)} students," if len(among) > 1 else ""
    (a, b), (low, high) = (interval(r["metrics"][name]) for r in (best, slow))
    tie = ": a tie" if a <= high and low <= b else ""
    return (
        f"With {fewest} network call{'s' if fewest > 1 else ''} an image, {best['model']}{which} has {pretty(name)} "
        f"{value(best)}; its teacher has {value(slow)} with {calls(slow)}{tie}."
    )


def table(rows: Sequence[Row]) -> list[Table]:
    """A rich table a board, for 80 columns: figures, the first with its rank, calls and latency; the page has all."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = []
    for board in boards(rows):
        one = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=Text(board.title))
        one.title_justify = "left"
        found = columns(board)
        for name in ("images/s", "parameters", "peak memory", "training"):
            found.pop(name, None)
        for heading in found:
            justify: Any = "left" if heading == "model" else "right"
            words = [w if len(w) < 9 else f"{w[:5]}-\n{w[5:]}" for w in pretty(heading).split()]
            one.add_column("\n".join(words), justify=justify, no_wrap=True)
        for i, row in enumerate((*board.rows, *board.real)):
            cells = []
            for heading, column in found.items():
                rank = f" ({column[i].rank})" if column[i].rank and heading == board.metrics[0] else ""
                cells.append(column[i].text + rank)
            one.add_row(*map(Text, cells), style="dim" if is_real(row) else None if is_teacher(row) else "bold")
        one.caption, one.caption_justify = (
            "(1) is the rank: one more than the rows whose intervals lie wholly before",
            "left",
        )
        out.append(one)
    return out


def markdown(rows: Sequence[Row]) -> str:
    """A table a board: value (low to high) #rank, tie where others share it; under it how its figures were made."""
    parts = []
    for board in boards(rows):
        found = columns(board)
        text = lambda value: str(value).replace("|", "\\|")
        lines = [
            f"## {board.title}",
            "",
            f"| {' | '.join(text(pretty(heading)) for heading in found)} |",
            "|---|" + "---:|" * (len(found) - 1),
        ]
        for i in range(len(board.rows) + len(board.real)):
            lines.append(f"| {' | '.join(text(cells[i]) for cells in found.values())} |")
        made: dict[str, list[str]] = {}
        for row in (*board.rows, *board.real):
            how = "; ".join(f"{k} {v}" for k, v in provenance(row))
            made.setdefault(how, []).append(label(row, board.rows))
        lines += ["", *(f"- {', '.join(names)}: {how}" for how, names in made.items() if how)]
        parts.append("\n".join(lines).rstrip() + "\n")
    note = (
        "A rank is one more than the rows whose whole interval is better; only figures of one protocol share a table.\n"
    )
    return "\n".join([*parts, note])


def provenance(row: Row) -> list[tuple[str, str]]:
    """How a row's figures were made, beyond what its table says."""
    words = lambda value: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return [(key, words(row[key])) for key in MADE if row.get(key) is not None]
