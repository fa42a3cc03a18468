"""Means and ratios over independent runs with their confidence intervals, of Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A mean (or ratio) with its confidence interval over n independent values."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g}, n = {self.n})"


def _independent(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    flat = [float(torch.tensor(v, dtype=torch.float64).mean()) for v in values]
    if len(flat) < 2 or not all(map(math.isfinite, flat)):
        shown = f"{flat}" if len(flat) < 20 else f"{len(flat)}, of which the first is {flat[0]}"
        raise ValueError(f"an interval needs at least 2 finite values, one per independent run; given {shown}")
    return torch.tensor(flat, dtype=torch.float64)


def mean_ci(values: Sequence[float] | Sequence[Sequence[float]], level: float = 0.95) -> Interval:
    """Mean and Student-t interval of independent values, such as one per training seed.

    A value may itself be a list (the noise seeds of one training run), which counts once, by its mean: repeated
    evaluations of one model are not independent runs.
    """
    from scipy.stats import t

    x = _independent(values)
    half = t.ppf(0.5 + level / 2, len(x) - 1) * (x.std() / len(x) ** 0.5).item()
    return Interval(x.mean().item(), x.mean().item() - half, x.mean().item() + half, len(x))


def ratio_ci(
    top: Sequence[float] | Sequence[Sequence[float]],
    bottom: Sequence[float] | Sequence[Sequence[float]],
    paired: bool = False,
    level: float = 0.95,
) -> Interval:
    """mean(top) / mean(bottom) of positive values with an interval on the log scale; nested lists as in `mean_ci`.

    Not paired: the delta method with Welch's degrees of freedom, n the smaller side. `paired`: value i of both sides
    belongs together (a student and its own teacher): the geometric mean of the n ratios with its t interval.
    """
    from scipy.stats import t

    x, y = _independent(top), _independent(bottom)
    if (x <= 0).any() or (y <= 0).any():
        raise ValueError(f"a ratio on the log scale needs positive values; given {x.tolist()} over {y.tolist()}")
    if paired:
        if len(x) != len(y):
            raise ValueError(f"paired values come in equal numbers; given {len(x)} over {len(y)}")
        log = mean_ci((x / y).log().tolist(), level)
        return Interval(math.exp(log.mean), math.exp(log.low), math.exp(log.high), len(x))
    parts = [(v.var() / len(v) / v.mean() ** 2).item() for v in (x, y)]  # variance of the log of each mean
    ratio, spread = (x.mean() / y.mean()).item(), sum(parts)
    freedom = spread**2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (x, y))) if spread else 1.0
    factor = math.exp(t.ppf(0.5 + level / 2, freedom) * spread**0.5)
    return Interval(ratio, ratio / factor, ratio * factor, min(len(x), len(y)))
