"""The picture of the README, from the folder of `make demo`: samples of teacher and student, quality against cost.

python -m benchmarks.picture --demo runs/demo --out docs/demo.png
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image, ImageDraw, ImageFont

TILE = 32  # pixels of a digit, four times its 8
GAP = 4  # pixels between digits
ROWS = 5
COLUMNS = 8
PAD = 14
TITLE = 26  # pixels of a line of text
PLOT = (330, 190)  # size of the plot
COLOURS = {"teacher": "#475569", "dmd2": "#c2410c", "sid": "#0f766e"}


@dataclass(frozen=True)
class Picture:
    """What to draw."""

    demo: Path = Path("runs/demo")  # the folder that `make demo` wrote
    out: Path = Path("docs/demo.png")
    student: str = "dmd2"


def draw_samples(folder: Path) -> Image.Image:
    """The first ROWS x COLUMNS images of a folder as one grid of grey levels."""
    grid = Image.new("L", (COLUMNS * (TILE + GAP) - GAP, ROWS * (TILE + GAP) - GAP), 255)
    for i in range(ROWS * COLUMNS):
        row, column = divmod(i, COLUMNS)
        with Image.open(folder / f"{i:06d}.png") as image:
            tile = image.convert("L").resize((TILE, TILE), Image.Resampling.NEAREST)
        grid.paste(tile, (column * (TILE + GAP), row * (TILE + GAP)))
    return grid


def draw_plot(canvas: Image.Image, left: int, top: int, rows: list[dict[str, Any]], real: float) -> None:
    """Distance to held-out digits against network calls, on logarithmic axes; `real`: that of real digits."""
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    width, height = PLOT
    points = [(row["model"], row["cost"]["nfe"], row["metrics"]["fd_heldout"]["value"]) for row in rows]
    low = math.log(real) - 0.3
    high = math.log(max(value for *_, value in points)) + 0.2
    last = math.log(max(calls for _, calls, _ in points)) + 0.3

    def axes_position(calls: float, value: float) -> tuple[float, float]:
        x = left + 40 + (width - 60) * (math.log(calls) + 0.2) / (last + 0.2)
        return x, top + height - 24 - (height - 40) * (math.log(value) - low) / (high - low)

    draw.line([(left + 40, top), (left + 40, top + height - 24), (left + width, top + height - 24)], fill="#94a3b8")
    for calls in sorted({calls for _, calls, _ in points}):
        draw.text((axes_position(calls, real)[0] - 6, top + height - 20), f"{calls}", fill="#334155", font=font)
    for value in (10, 20, 50, 100):
        if low < math.log(value) < high:
            draw.text((left + 8, axes_position(1, value)[1] - 7), f"{value:>3}", fill="#334155", font=font)
    draw.line([(left + 40, axes_position(1, real)[1]), (left + width, axes_position(1, real)[1])], fill="#a3a3a3")
    draw.text((left + width - 82, axes_position(1, real)[1] + 2), "real digits", fill="#737373", font=font)
    teacher = sorted((calls, value) for model, calls, value in points if model == "teacher")
    draw.line([axes_position(*point) for point in teacher], fill=COLOURS["teacher"], width=2)
    for i, (model, calls, value) in enumerate(points):
        x, y = axes_position(calls, value)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=COLOURS.get(model, "#7c3aed"))
        if model != "teacher":
            draw.text((x + 8, y - 18 + 14 * (i % 2)), model, fill=COLOURS.get(model, "#7c3aed"), font=font)
    x, y = axes_position(*teacher[1])
    draw.text((x + 8, y - 16), "teacher", fill=COLOURS["teacher"], font=font)


def main(picture: Picture) -> None:
    """Draw the picture and write it as a PNG of 96 colours."""
    rows = json.loads((picture.demo / "rows.json").read_text())
    real = next(row for row in rows if row["kind"] == "real")["metrics"]["fd_heldout"]["value"]
    models = [row for row in rows if row["kind"] != "real"]
    samples = [picture.demo / "samples" / "teacher-35", picture.demo / "samples" / f"{picture.student}-1"]
    titles = ["teacher: 35 network calls", f"student ({picture.student}): 1 network call"]
    grids = [draw_samples(folder) for folder in samples]
    width, height = grids[0].size
    canvas = Image.new("RGB", (4 * PAD + 2 * width + PLOT[0], 3 * PAD + TITLE + max(height, PLOT[1])), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(16)
    for i, (grid, title) in enumerate(zip(grids, titles, strict=True)):
        left = PAD + i * (width + PAD)
        draw.text((left, PAD), title, fill="#0f172a", font=font)
        canvas.paste(grid, (left, PAD + TITLE))
    left = 3 * PAD + 2 * width
    draw.text((left, PAD), "distance to real digits (y), network calls (x)", fill="#0f172a", font=font)
    draw_plot(canvas, left, PAD + TITLE, models, real)
    picture.out.parent.mkdir(parents=True, exist_ok=True)
    canvas.quantize(96, Image.Quantize.FASTOCTREE).save(picture.out, optimize=True)


if __name__ == "__main__":
    main(tyro.cli(Picture, use_underscores=True, description=__doc__))
