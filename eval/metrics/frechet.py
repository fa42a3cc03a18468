"""The Frechet distance of two feature sets, and the moments that it needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from eval.metrics.intervals import Score, influence_interval
from eval.metrics.sets import chunks, validate_features

if TYPE_CHECKING:
    from eval.metrics.sets import Set

ROUNDING = 1e-5  # of a covariance, relative to its largest value: published files hold float32


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] (over n - 1) of n samples."""

    n: int
    mean: Tensor
    cov: Tensor

    def validate(self, name: str) -> Moments:
        """The same with an exactly symmetric covariance. ValueError, with `name`, if the values are impossible."""
        mean = self.mean
        cov = self.cov
        if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{name}: mu has shape {list(mean.shape)} and sigma {list(cov.shape)}; [D] and [D, D] are needed"
            )
        for key, values in (("mu", mean), ("sigma", cov)):
            if not torch.isfinite(values).all():
                raise ValueError(f"{name}: {key} holds NaN or infinite values; make the statistics again")
        off = (cov - cov.T).abs().max()
        if off > ROUNDING * cov.abs().max():
            raise ValueError(f"{name}: sigma is not a covariance: it is asymmetric by {off:.3g}")
        cov = (cov + cov.T) / 2
        values = _eigenvalues(cov, name)
        if values[-1] <= 0:
            raise ValueError(f"{name}: sigma has no positive eigenvalue; make it from more than one image")
        if values[0] < -ROUNDING * values[-1]:
            raise ValueError(f"{name}: sigma is not a covariance: it has the negative eigenvalue {values[0]:.3g}")
        return Moments(self.n, mean, cov)


def moments(x: Set | Moments, name: str = "first") -> Moments:
    """Running sums over the chunks of a set (Chan et al. 1979). ValueError for NaN and for n <= D."""
    if isinstance(x, Moments):
        return x
    width = x.shape[-1] if isinstance(x, Tensor) else next(x.chunks()).shape[1]
    validate_features(x, name, width + 1)  # with less the covariance is singular
    n = 0
    mean = torch.zeros(width, dtype=torch.float64)
    scatter = torch.zeros(width, width, dtype=torch.float64)
    for chunk in chunks(x):
        k = len(chunk)
        centre = chunk.mean(0)
        step = centre - mean
        part = chunk - centre
        scatter += part.T @ part + torch.outer(step, step) * (n * k / (n + k))
        mean = mean + step * (k / (n + k))
        n += k
    return Moments(n, mean, scatter / (n - 1))


def frechet(a: Set | Moments, b: Set | Moments) -> float:
    """Frechet distance of the Gaussians fitted to two sets (Dowson & Landau 1982; Heusel et al. 2017).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), covariances over n - 1, by symmetric eigen-decompositions.
    Biased upwards at finite n. ValueError for NaN and for n <= D; a covariance that is singular for another reason (a
    constant feature) is no problem: negative eigenvalues, which are rounding, count as zero.
    """
    a = moments(a, "first")
    b = moments(b, "second")
    _same_width(a, b)
    root = _root(a.cov)
    cross = _eigenvalues(root @ b.cov @ root, "the product of the covariances").clamp(min=0).sqrt().sum()
    return _distance(a, b, cross)


def fid(fake: Set, real: Set | Moments, strata: Tensor | None = None) -> Score:
    """`frechet` with its interval by influence: psi = 2 d.m + d.d - d.T d for d = x - mu, m = mu - mu_real.

    T = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2 is the optimal map between the Gaussians, A^-1/2 the pseudo-inverse.
    """
    a = moments(fake, "generated")
    b = moments(real, "reference")
    _same_width(a, b)
    values, vectors = symmetric_eigen(a.cov, "the generated covariance")
    keep = values > values[-1].clamp(min=0) * 1e-12
    scaled = vectors[:, keep] * values[keep].sqrt()  # a square root of A
    inner, turn = symmetric_eigen(scaled.T @ b.cov @ scaled, "the product of the covariances")
    inner = inner.clamp(min=0).sqrt()
    white = vectors[:, keep] / values[keep].sqrt() @ turn

    def psi() -> Iterator[Tensor]:
        for chunk in chunks(fake):
            d = chunk - a.mean
            yield 2 * d @ (a.mean - b.mean) + d.square().sum(1) - (d @ white).square() @ inner

    return influence_interval(_distance(a, b, inner.sum()), psi(), strata)


def _same_width(a: Moments, b: Moments) -> None:
    if len(a.mean) != len(b.mean):
        raise ValueError(f"the sets have {len(a.mean)} and {len(b.mean)} features; they must come from one extractor")


def _root(cov: Tensor) -> Tensor:
    values, vectors = symmetric_eigen(cov, "the covariance")
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def symmetric_eigen(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix. ValueError for NaN and infinite values."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # torch raises it for some matrices with NaN
        values = vectors = torch.tensor([math.nan])
    if not (torch.isfinite(values).all() and torch.isfinite(vectors).all()):
        raise ValueError(f"{name} has no finite eigenvalues; the features or the reference are too large, or NaN")
    return values, vectors


def _eigenvalues(matrix: Tensor, name: str) -> Tensor:
    return symmetric_eigen(matrix, name)[0]


def _distance(a: Moments, b: Moments, cross: Tensor) -> float:
    value = ((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross).item()
    if not math.isfinite(value):
        raise ValueError(f"the distance is {value}; the features or the reference are too large, or NaN")
    return max(0.0, value)  # a negative one is rounding
