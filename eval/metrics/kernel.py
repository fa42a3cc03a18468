"""Kernel distances of two feature sets: KID and CMMD."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eval.metrics.intervals import Score, influence_interval
from eval.metrics.sets import chunks, count_rows, normalise_rows, read_rows, validate_pair

if TYPE_CHECKING:
    from eval.metrics.sets import Set


def kid(
    fake: Set, real: Set, strata: Tensor | None = None, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> Score:
    """Kernel distance (Binkowski et al. 2018, arXiv 1801.01401): unbiased MMD^2 of the kernel (x.y / D + 1)^3.

    The mean over subsets of `size` images (of all, where there are fewer), drawn as torch-fidelity draws them.
    Influence: psi = 2 (E k(x, fake) - E k(x, real)). Unbiased in n; it may be negative. ValueError for NaN, n < 2.
    """
    width = validate_pair(fake, real, 2)
    n = count_rows(fake)
    m = count_rows(real)
    size = min(size, n, m)
    full = size == n == m  # every subset is the whole
    pick = np.random.RandomState(seed)
    total = 0.0
    psi = torch.zeros(n, dtype=torch.float64)
    drawn = torch.zeros(n, dtype=torch.float64)
    times = 1 if full else subsets
    for _ in range(times):
        i, j = (torch.from_numpy(pick.choice(k, size, replace=False)) for k in (n, m))
        x = read_rows(fake, i)
        y = read_rows(real, j)
        kxx, kyy, kxy = ((u @ v.T / width + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        kxx.fill_diagonal_(0)
        kyy.fill_diagonal_(0)
        pairs = size * (size - 1)
        total += (kxx.sum() / pairs + kyy.sum() / pairs - 2 * kxy.mean()).item()
        psi[i] += 2 * (kxx.sum(1) / (size - 1) - kxy.mean(1))
        drawn[i] += 1
    is_drawn = drawn > 0
    result = influence_interval(total / times, [(psi / drawn)[is_drawn]], None if strata is None else strata[is_drawn])
    return result._replace(n=n)


def cmmd(fake: Set, real: Set, strata: Tensor | None = None, sigma: float = 10.0) -> Score:
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603): 1000 MMD^2 of a Gaussian kernel on CLIP embeddings of length 1.

    The biased estimator of the authors' code (with the diagonal), by blocks of images. Influence as in `kid`.
    """
    validate_pair(fake, real, 2)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp((x @ y.T - 1) / sigma**2)  # |x - y|^2 = 2 - 2 x.y

    def kernel_means(x: Set, y: Set) -> Tensor:
        """E over y of k(x_i, y), [N]."""
        out = []
        for a in normalise_rows(chunks(x)):
            out.append(torch.stack([kernel(a, b).sum(1) for b in normalise_rows(chunks(y))]).sum(0) / count_rows(y))
        return torch.cat(out)

    within = kernel_means(fake, fake)
    cross = kernel_means(fake, real)
    other = kernel_means(real, real)
    value = 1000 * (within.mean() + other.mean() - 2 * cross.mean()).item()
    return influence_interval(value, [2000 * (within - cross)], strata)
