"""Inline SVG by matplotlib that follows the page's light or dark colours, and sample grids as PNG."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Sentinel colours: matplotlib writes them, the page's style sheet decides what they are.
INK, FAINT, FLOOR, TEACHER = "#010203", "#010204", "#010205", "#010206"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
VARIABLES = {INK: "ink", FAINT: "rule", FLOOR: "floor", TEACHER: "teacher"} | {
    colour: f"s{i}" for i, colour in enumerate(SERIES)
}
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "distill",  # the same figure gives the same bytes
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
}


def svg(figure: Any, label: str) -> str:
    """A matplotlib figure -> an <svg> element that scales to its box and holds no address of any kind."""
    import matplotlib.pyplot as plt

    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    size = r'<svg [^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>'
    width = float(re.match(size, text).group(1)) * 4 / 3  # points to pixels
    label = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    style = f"--w: {width:.0f}px; max-width: var(--w)"
    head = rf'<svg viewBox="0 0 \1 \2" style="{style}" role="img" aria-label="{label}">'
    return re.sub(size, lambda m: m.expand(head), text, count=1)


def name_of(row: dict[str, Any]) -> str:
    """How a row is called in a plot or a headline."""
    return str(row["model"])


def is_teacher(row: dict[str, Any]) -> bool:
    """By the row's "student" where it is there, else by its name."""
    return not row["student"] if row.get("student") is not None else name_of(row).lower().startswith("teacher")


def quality(rows: Sequence[dict[str, Any]], floor: float | None, key: str = "fd_heldout") -> str:
    """Distance against network evaluations: the teacher as a curve, students as labelled points, the floor dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = sorted((r for r in rows if r.get("nfe") and r.get(key) is not None), key=lambda r: r["nfe"])
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(10.6, 4.8), layout="constrained")
        ax.set_xscale("log")
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if is_teacher(row):
                curves.setdefault(name_of(row), []).append(row)
        marks = []
        for i, (name, points) in enumerate(curves.items()):
            line = (["-", "--", ":"])[i % 3]
            ax.plot([p["nfe"] for p in points], [p[key] for p in points], line, color=TEACHER, marker="o", ms=5, lw=1.8)
            marks.append((points[-1], name, TEACHER))
        students = [r for r in rows if not is_teacher(r)]
        for row, colour in zip(students, (SERIES * len(students))[: len(students)]):
            ax.plot(row["nfe"], row[key], "D", color=colour, ms=6.5)
            marks.append((row, name_of(row), colour))
        for row, _, colour in marks + [(p, "", TEACHER) for points in curves.values() for p in points[:-1]]:
            if row.get(f"{key}_ci"):
                ax.vlines(row["nfe"], *row[f"{key}_ci"], color=colour, lw=1.4)
        if floor is not None:
            ax.axhline(floor, color=FLOOR, ls=(0, (5, 4)), lw=1.3)
        values = [r[key] for r in rows] + ([floor] if floor is not None else [])
        if values and max(values) > 6 * min(values) > 0:
            ax.set_yscale("log")
            low, high = min(values) / 1.25, max(values) * 1.25
            ticks = [m * 10**e for e in range(-3, 6) for m in (1, 2, 5) if low <= m * 10**e <= high]
            ax.yaxis.set_major_locator(FixedLocator(ticks))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.set_ylim(low, high)
        else:
            ax.set_ylim(0, 1.15 * max(values, default=1))
        nfes = sorted({r["nfe"] for r in rows}) or [1]
        ax.set_xlim(min(nfes) / 1.25, max(nfes) * 2.1)
        ax.xaxis.set_major_locator(FixedLocator(nfes))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.set_xlabel("network evaluations per image")
        ax.set_title("Frechet distance to held-out digits (lower is better)", pad=10)
        if floor is not None:
            below = bool(rows) and rows[-1][key] >= floor  # away from the last label
            ax.annotate(
                f"real against real {floor:.1f}",
                (1, floor),
                xycoords=("axes fraction", "data"),
                xytext=(-2, -5 if below else 4),
                textcoords="offset points",
                ha="right",
                va="top" if below else "bottom",
                color=FLOOR,
            )
        _labels(figure, ax, [(row["nfe"], row[key], f"{name} {row[key]:.1f}", colour) for row, name, colour in marks])
        return svg(figure, "Frechet distance against network evaluations")


def _labels(figure: Any, ax: Any, marks: list[tuple[float, float, str, str]], gap: float = 13.0) -> None:
    """A label right of each mark; those at the same x are spread until none overlaps, with a thin leader line."""
    figure.canvas.draw()
    points = 72 / figure.dpi
    for x in {m[0] for m in marks}:
        column = sorted((m for m in marks if m[0] == x), key=lambda m: m[1])
        real = [ax.transData.transform((m[0], m[1]))[1] * points for m in column]
        spread = list(real)
        for _ in range(200):
            for i in range(len(spread) - 1):
                lack = gap - (spread[i + 1] - spread[i])
                if lack > 0.01:
                    spread[i], spread[i + 1] = spread[i] - lack / 2, spread[i + 1] + lack / 2
        bottom = ax.transAxes.transform((0, 0))[1] * points + gap / 2
        spread = [s + max(0.0, bottom - spread[0]) for s in spread]
        for (x0, y0, text, colour), at, to in zip(column, real, spread):
            line = dict(arrowstyle="-", color=colour, lw=0.7, shrinkA=0, shrinkB=4) if abs(to - at) > 1 else None
            ax.annotate(
                text,
                (x0, y0),
                xytext=(16 if len(column) > 1 else 10, to - at),
                textcoords="offset points",
                va="center",
                color=colour,
                arrowprops=line,
            )


def read_log(path: Path) -> dict[str, list[tuple[float, float]]]:
    """log.jsonl -> {quantity: [(step, value), ...]}, finite numbers only; ValueError for a line that is no JSON."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = float(entry["step"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}, line {number}: not a JSON object with a "step": {line[:80]!r}') from None
        for key, value in entry.items():
            number_like = isinstance(value, int | float) and not isinstance(value, bool)
            if key not in ("step", "seconds") and number_like and math.isfinite(value):
                curves.setdefault(key, []).append((step, float(value)))
    return curves


def training(name: str, path: Path, most: int = 8) -> str:
    """One run's log: a small panel per quantity, every value faint and a running mean in front."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = dict(list(read_log(path).items())[:most])
    if not curves:
        return '<p class="note">The log holds no numbers.</p>'
    panels = []
    for i, (key, points) in enumerate(curves.items()):
        step, value = np.array(points).T
        colour, many = SERIES[i % len(SERIES)], len(value) > 40
        with plt.rc_context(STYLE | {"font.size": 9}):
            figure, ax = plt.subplots(figsize=(2.6, 1.7), layout="constrained")
            if many:
                ax.plot(step, value, color=colour, lw=0.8, alpha=0.3)
            ax.plot(step, _running_mean(value, max(1, len(value) // 20)) if many else value, color=colour, lw=1.6)
            low, high = np.percentile(value, [1, 99])
            if high > low:
                ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
            ax.set_title(key)
            ax.set_xlabel("step")
            ax.margins(x=0.02)
            ax.locator_params(nbins=4)
            panels.append(svg(figure, f"{key} while training {name}"))
    return f'<div class="panels">{"".join(panels)}</div>'


def _running_mean(value: np.ndarray, width: int) -> np.ndarray:
    total = np.concatenate([[0.0], np.cumsum(value)])
    right = np.arange(1, len(value) + 1)
    left = np.maximum(0, right - width)
    return (total[right] - total[left]) / (right - left)


def grid(images: Tensor, labels: Tensor | None, rows: int = 6, columns: int = 10, scale: int = 6) -> str:
    """Images [N, C, H, W] in [-1, 1] -> a PNG data address; column j holds the first images of class j, in order.

    Without labels the images run line by line. Enlarged by whole pixels; absent images are transparent.
    """
    from PIL import Image

    from eval.images import quantize

    _, channels, height, width = images.shape
    if labels is None:
        cells = {(i // columns, i % columns): i for i in range(min(len(images), rows * columns))}
    else:
        of_class = [(labels == j).nonzero().flatten()[:rows].tolist() for j in range(columns)]
        cells = {(i, j): pick for j, column in enumerate(of_class) for i, pick in enumerate(column)}
    lines = 1 + max(i for i, _ in cells)
    canvas = torch.zeros(lines * (height + 1) - 1, columns * (width + 1) - 1, channels + 1, dtype=torch.uint8)
    for (i, j), pick in cells.items():
        at = canvas[i * (height + 1) :, j * (width + 1) :][:height, :width]
        at[..., :channels], at[..., channels] = quantize(images[pick]).permute(1, 2, 0), 255
    big = canvas.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    stream = io.BytesIO()
    Image.fromarray(big.numpy(), "LA" if channels == 1 else "RGBA").save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
