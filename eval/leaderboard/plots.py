"""Plots as SVG, with the colours of the style sheet, and grids of samples as data addresses."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from torch import Tensor

from eval.files import read_text
from eval.images.images import quantize
from eval.images.manifest import is_finite
from eval.markup import NOTHING, Markup, join, tag

WIDTH = 620  # of a scatter plot, in its own units, as all of these
HEIGHT = 430
LEFT = 58  # margins
RIGHT = 18
TOP = 18
BOTTOM = 52
WIDE = WIDTH - LEFT - RIGHT
TALL = HEIGHT - TOP - BOTTOM
CHARACTER = 6.6  # mean width of a letter at 12 px


Box = tuple[float, float, float, float]  # left, top, right, bottom


class Point(NamedTuple):
    """One row in a scatter plot."""

    x: float  # positive: cost
    y: float  # quality
    label: str
    style: str  # a class of the style sheet: teacher, s0 ... s5
    series: str = ""  # points of one series are joined
    low: float | None = None  # of the interval of y
    high: float | None = None


def pareto_front(points: Sequence[Point], lower: bool) -> list[Point]:
    """The Pareto front by ascending x: points that no other point beats in y at the same or a smaller x.

    lower: smaller y are better. Of equal points the first is kept.
    """
    sign = 1 if lower else -1
    best = math.inf
    front = []
    for point in sorted(points, key=lambda p: (p.x, sign * p.y)):
        if sign * point.y < best:
            best = sign * point.y
            front.append(point)
    return front


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, 2, 5 times powers of ten; powers alone over more than three of them."""
    many = high > 1000 * low
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [m * 10.0**e for e in powers for m in ((1,) if many else (1, 2, 5))]
    return [t for t in values if low <= t * 1.0000001 and t <= high * 1.0000001]


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Ticks of a linear axis: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.9999)
    return [i * size for i in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def format_tick(value: float) -> str:
    """A tick: 0.002, 0.5, 20, 3k, 2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1000 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """A time: 350 us, 12 ms, 1.5 s."""
    for size, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= size * 0.9999:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _largest_distance(values: Sequence[float], best: float) -> float:
    """The distance from the best value beyond which a value is off the scale."""
    return 4 * abs(median(values) - best) or math.inf if len(values) > 3 else math.inf


def _y_span(point: Point) -> list[float]:
    """The value of a point and the ends of its interval."""
    return [value for value in (point.y, point.low, point.high) if value is not None]


class Axes:
    """The axes of a scatter plot. x is logarithmic; y too if it spans more than a factor of six.

    A value more than four times as far from the best value as the median is drawn at the plot's edge, off the scale. So
    one bad row does not compress all others.
    """

    def __init__(self, points: Sequence[Point], lower: bool, reference: float | None) -> None:
        references = [] if reference is None else [reference]
        self._set_y_range(points, lower, references)
        self.edge = TOP + 7 if lower else HEIGHT - BOTTOM - 7
        self.xs = sorted({p.x for p in points})
        of_x: dict[float, list[Point]] = {x: [] for x in self.xs}
        for point in sorted(points, key=lambda p: p.y):
            of_x[point.x].append(point)
        self._set_x_range(list(of_x.values()))

    def _set_y_range(self, points: Sequence[Point], lower: bool, references: list[float]) -> None:
        values = [p.y for p in points] + references
        best = min(values) if lower else max(values)
        far = _largest_distance(values, best)
        self.off = {p: abs(p.y - best) > far for p in points}
        spans = [v for p in points if not self.off[p] for v in _y_span(p)] + references
        inside = [v for v in values if abs(v - best) <= far]
        self.log = min(spans) > 0 and max(inside) > 6 * min(inside)
        room = 0.08 * (max(spans) - min(spans)) or abs(best) * 0.1 or 1.0
        self.low = min(spans) / 1.15 if self.log else min(spans) - room
        self.high = max(spans) * 1.15 if self.log else max(spans) + room

    def _set_x_range(self, columns: list[list[Point]]) -> None:
        self.right = self.xs[-1] * (1.35 if len(self.xs) > 1 else 4)
        lead = min(12 + 6 * len(columns[0]), 0.3 * WIDE) / WIDE  # room before the first column, for points and names
        start = (math.log(self.xs[0]) - lead * math.log(self.right)) / (1 - lead)
        self.left = min(self.xs[0] / 1.35, math.exp(start))
        at = [LEFT, *map(self.x, self.xs), WIDTH - RIGHT]
        self.shift: dict[Point, float] = {}
        for i, column in enumerate(columns):
            room = 0.8 * min(at[i + 1] - at[i], at[i + 2] - at[i + 1])  # beside one another, and short of the next
            step = min(8.0, room / max(len(column) - 1, 1))
            self.shift |= {p: step * (k - (len(column) - 1) / 2) for k, p in enumerate(column)}

    def x(self, value: float) -> float:
        return LEFT + WIDE * math.log(value / self.left) / math.log(self.right / self.left)

    def y(self, value: float) -> float:
        place = math.log if self.log else float
        value = max(value, self.low) if self.log else value
        return TOP + TALL * (place(self.high) - place(value)) / (place(self.high) - place(self.low))

    def position(self, point: Point) -> tuple[float, float]:
        """(x, y) of a point. Points of the same cost are shifted apart, so that each interval is visible."""
        return self.x(point.x) + self.shift[point], self.edge if self.off[point] else self.y(point.y)

    def draw_axes(self, across: str, up: str, tick: Callable[[float], str]) -> list[Markup]:
        """The grid, its ticks and the names of the axes."""
        out = []
        foot = HEIGHT - BOTTOM
        before = -math.inf
        for value in log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high):
            y = self.y(value)
            out.append(tag('<path class="grid" d="M{} {:.1f}H{}"/>', LEFT, y, WIDTH - RIGHT))
            at = LEFT - 8, y + 4, format_tick(value)
            out.append(tag('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>', *at))
        for value in self.xs if len(self.xs) <= 6 else log_ticks(self.left, self.right):
            x = self.x(value)
            out.append(tag('<path class="grid" d="M{:.1f} {}V{}"/>', x, TOP, foot))
            if x - before >= len(tick(value)) * CHARACTER + 8:
                under = x, foot + 18, tick(value)
                out.append(tag('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>', *under))
                before = x
        middle = LEFT + WIDE / 2, HEIGHT - 10, across
        out.append(tag('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>', *middle))
        turned = f"translate(13 {TOP + TALL / 2}) rotate(-90)"
        out.append(tag('<text class="axis" text-anchor="middle" transform="{}">{}</text>', turned, up))
        return out


def scatter(
    points: Sequence[Point],
    lower: bool,
    across: str,
    up: str,
    reference: tuple[str, float] | None = None,
    tick: Callable[[float], str] = format_tick,
) -> Markup:
    """Quality against cost as <svg>: points with intervals, series joined, the Pareto front stepped, labels apart.

    across, up: what the axes are. reference: (name, y) of a dashed line. tick: how a cost is written.
    """
    frame = Axes(points, lower, reference and reference[1])
    best = pareto_front(points, lower)
    out = frame.draw_axes(across, f"{up}, {'lower' if lower else 'higher'} is better", tick)
    lines = join([_draw_pareto_front([frame.position(p) for p in best]), *_series(points, frame)])
    inner = LEFT, TOP, WIDE, TALL, lines  # an inner svg clips its content
    out.append(tag('<svg x="{0}" y="{1}" width="{2}" height="{3}" viewBox="{0} {1} {2} {3}">{4}</svg>', *inner))
    taken = Boxes((x - 7, y - 7, x + 7, y + 7) for x, y in map(frame.position, points))  # no label covers these
    if reference:
        out.append(_reference(*reference, frame, taken))
    fronts = set(best)
    first = lambda p: p in fronts or p.style == "teacher" or frame.off[p]  # where not all names find room
    for p in sorted(points, key=lambda p: (not first(p), frame.position(p)[1], p.x)):
        label = f"{p.label} ({format_tick(p.y)}, off the scale)" if frame.off[p] else p.label
        box = _find_label_box(*frame.position(p), len(label) * CHARACTER, taken)
        if box:
            taken.add(box)
        about = f"{p.label}: {up} {format_tick(p.y)}, {tick(p.x)}{', on the Pareto front' if p in fronts else ''}"
        kind = f"point {p.style}{' best' if p in fronts else ''}"
        out.append(tag('<g class="{}"><title>{}</title>{}</g>', kind, about, _mark(p, frame, label, box)))
    title = f"{up} against {across}, with the Pareto front"
    drawn = WIDTH, HEIGHT, title, join(out)
    return tag('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>', *drawn)


def _draw_pareto_front(stairs: Sequence[tuple[float, float]]) -> Markup:
    """The Pareto front, stepped."""
    (x, y), *others = stairs
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in others)
    return tag('<path class="front" d="M{:.1f} {:.1f}{}H{}"/>', x, y, steps, WIDTH - RIGHT)


def _series(points: Sequence[Point], frame: Axes) -> Iterator[Markup]:
    """A line through the points of each series."""
    lines: defaultdict[str, list[Point]] = defaultdict(list)
    for point in sorted(points, key=lambda p: p.x):
        lines[point.series].append(point)
    for series, line in lines.items():
        if series and len(line) > 1:
            drawn = " ".join(f"{frame.position(p)[0]:.1f},{frame.y(p.y):.1f}" for p in line)
            yield tag('<polyline class="series {}" points="{}"/>', line[0].style, drawn)


def _reference(name: str, value: float, frame: Axes, taken: Boxes) -> Markup:
    """A dashed line, and its name at a free place."""
    y = frame.y(value)
    long = len(name) * CHARACTER
    starts = range(int(WIDTH - RIGHT - long), LEFT, -12)
    tries = [(x, y + d, x + long, y + d + 15) for x in (*starts, LEFT) for d in (-18, 4)]
    box = next((box for box in tries if not taken.intersects(box)), tries[0])
    taken.add(box)
    line = tag('<path class="reference" d="M{} {:.1f}H{}"/>', LEFT, y, WIDTH - RIGHT)
    return line + tag('<text class="label reference" x="{}" y="{:.1f}">{}</text>', box[0], box[1] + 12, name)


def _mark(p: Point, frame: Axes, label: str, box: Box | None) -> Markup:
    """A point, its interval and its label in `box`, if there is one. A line leads to a distant label."""
    x, y = frame.position(p)
    out = NOTHING
    name = NOTHING
    if box:
        left = box[0]
        middle = (box[1] + box[3]) / 2
        name = tag('<text class="label" x="{:.1f}" y="{:.1f}">{}</text>', left, middle + 4, label)
        near = left - 2 if left > x else box[2] + 2
        if abs(middle - y) > 9:
            out += tag('<path class="leader" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>', x, y, near, middle)
    if p.low is not None and p.high is not None and not frame.off[p]:
        out += tag('<path class="span" d="M{:.1f} {:.1f}V{:.1f}"/>', x, frame.y(p.low), frame.y(p.high))
    if frame.off[p]:
        tip = -7 if frame.edge < HEIGHT / 2 else 7
        out += tag('<path d="M{:.1f} {:.1f}h12l-6 {:.1f}z"/>', x - 6, y - tip / 2, tip * 1.4)
    elif p.style == "teacher":
        out += tag('<circle cx="{:.1f}" cy="{:.1f}" r="5"/>', x, y)
    else:
        out += tag('<path d="M{:.1f} {:.1f}l6.5 6.5l-6.5 6.5l-6.5-6.5z"/>', x, y - 6.5)
    return out + name


class Boxes:
    """Rectangles in the cells of a grid, to find intersections without testing all of them."""

    SIDE = 32.0

    def __init__(self, boxes: Iterable[Box]) -> None:
        self.squares: defaultdict[tuple[int, int], list[Box]] = defaultdict(list)
        for box in boxes:
            self.add(box)

    def add(self, box: Box) -> None:
        for square in self._squares_of(box):
            self.squares[square].append(box)

    def intersects(self, box: Box) -> bool:
        """Whether one of them intersects `box`."""
        near = (other for square in self._squares_of(box) for other in self.squares.get(square, ()))
        return any(_intersects(box, other) for other in near)

    def _squares_of(self, box: Box) -> Iterator[tuple[int, int]]:
        left, top, right, bottom = (int(edge // self.SIDE) for edge in box)
        return ((i, j) for i in range(left, right + 1) for j in range(top, bottom + 1))


def _find_label_box(x: float, y: float, long: float, taken: Boxes) -> Box | None:
    """The nearest free box inside the plot for the label of a point at (x, y); None if none is near.

    Tries the places beside the point first, then those above and below on the right, then on the left.
    """
    levels = [sign * 15 * i for i in range(1, 9) for sign in (-1, 1)]
    right = x + 11
    left = x - 11 - long
    for start, away in [(right, 0), (left, 0), *((right + 7, a) for a in levels), *((left - 7, a) for a in levels)]:
        box = (start, y + away - 8, start + long, y + away + 8)
        inside = LEFT <= box[0] and box[2] <= WIDTH - 2 and TOP - 8 <= box[1] and box[3] <= HEIGHT - BOTTOM
        if inside and not taken.intersects(box):
            return box
    return None


def _intersects(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def read_log(path: Path) -> dict[str, list[tuple[float, float]]]:
    """log.jsonl -> {quantity: [(step, value), ...]}, finite numbers only; ValueError for a line that is no JSON."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(read_text(Path(path), "name a run's log.jsonl").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = float(entry["step"])
            if not is_finite(step):
                raise ValueError(step)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise ValueError(f'{path}, line {number}: not a JSON object with a "step": {line[:80]!r}') from None
        for key, value in entry.items():
            if key not in ("step", "seconds") and is_finite(value):
                curves.setdefault(key, []).append((step, float(value)))
    return curves


def training_curves(name: str, path: Path, most: int = 8) -> Markup:
    """The log of a run: a small panel for each quantity, with faint values and their running mean."""
    curves = dict(list(read_log(path).items())[:most])
    if not curves:
        return tag('<p class="note">The log holds no numbers.</p>')
    return tag('<div class="panels">{}</div>', join(_panel(key, points, name) for key, points in curves.items()))


def _panel(key: str, points: Sequence[tuple[float, float]], name: str, wide: int = 240, tall: int = 140) -> Markup:
    values = sorted(v for _, v in points)
    low = values[len(values) // 100]
    high = values[-1 - len(values) // 100]  # a spike must not hide the rest
    room = 0.08 * (high - low) or abs(low) * 0.1 or 1.0
    low = low - room
    high = high + room
    last = max(points[-1][0], 1e-9)

    def line(points: Sequence[tuple[float, float]], kind: str) -> Markup:
        every = -(-len(points) // 150)  # a panel is 200 wide
        shown = [(s, min(max(v, low), high)) for s, v in points[::every]]
        at = [(34 + (wide - 40) * s / last, 20 + (tall - 42) * (high - v) / (high - low)) for s, v in shown]
        return tag('<polyline class="{}" points="{}"/>', kind, " ".join(f"{x:.1f},{y:.1f}" for x, y in at))

    mean = _running_mean([v for _, v in points], max(1, len(points) // 20))
    smooth = [(s, m) for (s, _), m in zip(points, mean)]
    out = [tag('<text class="title" x="34" y="12">{}</text>', key)]
    for value in linear_ticks(low, high, 3):
        y = 20 + (tall - 42) * (high - value) / (high - low)
        out.append(tag('<path class="grid" d="M34 {:.1f}H{}"/>', y, wide - 6))
        out.append(tag('<text class="tick" x="29" y="{:.1f}" text-anchor="end">{}</text>', y + 3.5, format_tick(value)))
    for value in (0, last):
        x, anchor = (34, "start") if value == 0 else (wide - 6, "end")
        place = x, tall - 6, anchor, format_tick(value)
        out.append(tag('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>', *place))
    if len(points) > 40:
        out += [line(points, "raw"), line(smooth, "mean")]
    else:
        out.append(line(points, "mean"))
    drawn = wide, tall, f"{key} while training {name}", join(out)
    return tag('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>', *drawn)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    out = []
    total = 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out


def image_grid(images: Tensor, labels: Tensor | None, rows: int = 6, columns: int = 10, side: int = 160) -> str:
    """Images [N, C, H, W] in [-1, 1] -> the data address of a picture. Column j holds the first images of class j.

    Without labels, images are placed line by line. Small images keep their size (PNG); large ones are reduced to `side`
    (JPEG). Absent images are transparent, or black in a JPEG.
    """
    from PIL import Image

    _, channels, height, width = images.shape
    cells = _grid_cells(len(images), labels, rows, columns)
    lines = 1 + max(i for i, _ in cells)
    across = 1 + max(j for _, j in cells)
    small = max(height, width) <= side
    shrink = (width * side // max(height, width), height * side // max(height, width))
    high, wide = (height, width) if small else shrink[::-1]
    gap = max(1, min(4, max(high, wide) // 8))
    sheet = Image.new("RGBA" if small else "RGB", (across * (wide + gap) - gap, lines * (high + gap) - gap))
    for (i, j), pick in cells.items():
        level = quantize(images[pick]).permute(1, 2, 0)
        level = level.expand(-1, -1, 3) if channels == 1 else level
        picture = Image.fromarray(level.contiguous().numpy())
        picture = picture if small else picture.resize((wide, high), Image.Resampling.LANCZOS)
        sheet.paste(picture, (j * (wide + gap), i * (high + gap)))
    sheet = sheet.convert("LA") if small and channels == 1 else sheet
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True) if small else sheet.save(stream, "JPEG", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64," + base64.b64encode(stream.getvalue()).decode()


def _grid_cells(n: int, labels: Tensor | None, rows: int, columns: int) -> dict[tuple[int, int], int]:
    """{(row, column): the number of the image there}: line by line, or column j with the first images of class j."""
    if labels is None:
        return {(i // columns, i % columns): i for i in range(min(n, rows * columns))}
    of_class = [(labels == j).nonzero().flatten()[:rows].tolist() for j in range(columns)]
    return {(i, j): pick for j, column in enumerate(of_class) for i, pick in enumerate(column)}
