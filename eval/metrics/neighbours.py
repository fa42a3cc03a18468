"""Figures of nearest neighbours: precision, recall, density, coverage and the proportion off the support."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eval.metrics.intervals import HalvingIntervals, Score, proportion
from eval.metrics.sets import count_rows, draw_indices, read_rows, validate_pair

if TYPE_CHECKING:
    from eval.metrics.sets import Set


def manifold(
    fake: Set,
    real: Set,
    strata: Tensor | None = None,
    k: int = 3,
    k_density: int = 5,
    limit: int = 10_000,
    seed: int = 0,
) -> dict[str, Score]:
    """precision, recall, density, coverage and off_support of n <= `limit` images, as many generated as real.

    A ball of an image reaches to its k-th nearest neighbour among its own set.
    precision: the proportion of generated images in a ball of the reference. recall: the proportion of the reference in
    a ball of a generated image (Kynkaanniemi et al. 2019, arXiv 1904.06991).
    density: the mean number of the reference's balls (k_density) that hold a generated image, over k_density. coverage:
    the proportion of these balls that hold a generated image (Naeem et al. 2020, arXiv 2002.09797).
    off_support: the proportion of generated images farther from the reference than 99 % of the reference from the rest
    of it (after mode interpolation, Aithal et al. 2024, arXiv 2406.09358; in feature space by us).
    All depend on n. Intervals: Wilson's for precision and off_support, halving for the others. ValueError for NaN and
    for n <= k.
    """
    validate_pair(fake, real, max(k, k_density) + 2)
    n = min(count_rows(fake), count_rows(real), limit)
    picked = draw_indices(count_rows(fake), n, seed)
    fakes = read_rows(fake, picked)
    reals = read_rows(real, draw_indices(count_rows(real), n, seed))
    ff = _squared(fakes, fakes)
    rr = _squared(reals, reals)
    fr = _squared(fakes, reals)
    ball = _radius(rr, k)
    wide = _radius(rr, k_density)
    inside = (fr <= ball).any(1)
    edge = _radius(rr, 1).quantile(0.99)
    far = fr.min(1).values > edge
    halves = HalvingIntervals(n, None if strata is None else strata[picked], seed)

    def recall(i: Tensor) -> float:
        return (fr[i] <= _radius(ff[i][:, i], k)[:, None]).any(0).double().mean().item()

    def density(i: Tensor) -> float:
        return ((fr[i] < wide).sum(1).double().mean() / k_density).item()

    def coverage(i: Tensor) -> float:
        return (fr[i].min(0).values < wide).double().mean().item()

    return {
        "precision": proportion(inside),
        "recall": halves(recall, 1.0),
        "density": halves(density),
        "coverage": halves(coverage, 1.0),
        "off_support": proportion(far),
    }


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [N, M], exactly 0 between equal rows; stored in float32."""
    a = x.square().sum(1)
    b = y.square().sum(1)
    out = torch.empty(len(x), len(y))
    for i in range(0, len(x), 1000):
        d = a[i : i + 1000, None] + b - 2 * x[i : i + 1000] @ y.T
        scale = a[i : i + 1000, None] + b
        out[i : i + 1000] = torch.where(d < 1e-13 * scale, 0.0, d)
    if not torch.isfinite(out).all():
        raise ValueError("distances of features overflow float32; the features are too large")
    return out


def _radius(distances: Tensor, k: int) -> Tensor:
    return distances.kthvalue(k + 1, dim=1).values  # the nearest is the sample itself
