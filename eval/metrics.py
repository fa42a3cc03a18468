"""Feature sets -> numbers: Frechet distance, precision and recall, accuracy; and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def _checked(feats: Tensor, name: str, least: int) -> Tensor:
    if feats.ndim != 2:
        raise ValueError(f"{name} features have shape {list(feats.shape)}; [N, D] is needed")
    if len(feats) < least:
        raise ValueError(
            f"{name} set has n = {len(feats)} samples of {feats.shape[1]} features; at least {least} are needed: "
            f"generate more images"
        )
    if not torch.isfinite(feats).all():
        bad = (~torch.isfinite(feats).all(1)).nonzero()[0].item()
        raise ValueError(f"{name} features of sample {bad} are NaN or infinite; find the step that made them")
    return feats.double()


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two feature sets [Na, D] and [Nb, D] (Heusel et al. 2017).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), covariances over N - 1, all in float64 by symmetric
    eigen-decompositions. It is biased upwards at finite n: compare figures of the same n only. ValueError for NaN and
    for N <= D, where the covariance is singular.
    """
    a, b = _checked(a, "first", a.shape[-1] + 1), _checked(b, "second", b.shape[-1] + 1)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the sets have {a.shape[1]} and {b.shape[1]} features; they must come from one extractor")
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, seed: int = 0) -> tuple[float, float, int]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) -> (precision, recall, n).

    A set's manifold is the union of balls around its samples that reach the k-th nearest other sample. Precision: the
    share of fakes in the real manifold; recall: of reals in the fakes'. Both depend on the density of the sets, so the
    larger is subsampled (seeded) and both have n samples. real [Nr, D], fake [Nf, D]; ValueError for NaN or n <= k.
    """
    real, fake = _checked(real, "real", k + 1), _checked(fake, "generated", k + 1)
    n = min(len(real), len(fake))
    order = torch.Generator().manual_seed(seed)
    real, fake = (x if len(x) == n else x[torch.randperm(len(x), generator=order)[:n]] for x in (real, fake))
    return _covered(fake, real, k), _covered(real, fake, k), n


def _covered(points: Tensor, of: Tensor, k: int) -> float:
    exact = "donot_use_mm_for_euclid_dist"  # the faster way loses digits where samples are close
    radius = torch.cdist(of, of, compute_mode=exact).kthvalue(k + 1, dim=1).values  # the first is the sample itself
    return (torch.cdist(points, of, compute_mode=exact) <= radius).any(1).double().mean().item()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest logit [N, K] is at the label [N] that was asked for."""
    if len(logits) != len(labels) or not len(labels):
        raise ValueError(f"{len(logits)} logits and {len(labels)} labels; one label per image is needed")
    return (logits.argmax(1) == labels).double().mean().item()


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
        raise ValueError(f"an interval needs at least 2 finite values, one per independent run; given {flat}")
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
