"""sLCT: improved training technique for latent consistency models. Dao et al. 2025, arXiv 2502.01441.

    L    = d( f(x_t, t) - sg f(x_r, r) ) / (s_t - s_r)  +  lambda |f(x_t, t) - x|^2 at the low levels       rest as CT
    d(y) = log( 1 + |y|^2 / (2 c^2) ),   c = exp(-1.18 ln N - 0.72)          N intervals of the curriculum's grid
    eps  : the normal noises of a micro-batch, those of a condition given to its images so that sum |x - eps|^2 is least

Latents have outliers: d forgets them, and c sharpens as the levels draw together. Coupled noise lowers the variance of
the targets; it depends on the other samples of the micro-batch. c, lambda and the share of low levels are second-hand;
the paper's LayerNorm without scale is a matter of the network. Gradients as in CT.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.curriculum import Doubling
from distill.diffusion.denoiser import Condition
from distill.diffusion.schedule import EDM
from distill.losses import cauchy_norm
from distill.methods.ct import CT
from distill.random import Draw
from distill.ranges import UnitInterval, Weight


@dataclass(frozen=True)
class SLCT(CT):
    """Consistency training of latents: robust to outliers, with coupled noise and a denoising loss at low levels."""

    curriculum: Doubling = Doubling()
    distance: Literal["huber", "square", "cauchy"] = "cauchy"
    c: Weight = 1.0  # times exp(-1.18 ln N - 0.72) where it is adaptive
    adaptive: bool = True
    coupled: bool = True  # noise by optimal transport within the micro-batch: O(B^3), on the host
    diffusion: Weight = 1.0  # lambda
    early: UnitInterval = 0.25  # the share of the grid, from its low end, that lambda is on

    def noise(self, x: Tensor, c: Condition, draw: Draw) -> Tensor:
        eps = super().noise(x, c, draw)
        return coupled(x, eps, c) if self.coupled else eps

    def far(self, delta: Tensor, draw: Draw) -> Tensor:
        if not self.adaptive or self.distance != "cauchy":
            return super().far(delta, draw)
        N = self.curriculum.intervals(draw.step)
        return cauchy_norm(delta, self.c * math.exp(-1.18 * math.log(N) - 0.72))

    def more(self, error: Tensor, s: Tensor) -> Tensor | float:
        if not self.diffusion:
            return 0.0
        grid = self.curriculum
        low = EDM(grid.low, grid.high, grid.rho).time(s) <= self.early
        return self.diffusion * low.to(error) * error.flatten(1).square().sum(1)


def coupled(x: Tensor, eps: Tensor, c: Condition = None) -> Tensor:
    """eps [B, ...] in the order that makes the sum of |x - eps|^2 least: optimal transport between two batches.

    Each condition of c keeps its own noises: coupled across them, noise would tell of the condition, and samples start
    from noise that does not.
    """
    from scipy.optimize import linear_sum_assignment

    if eps.is_meta:  # shapes alone, as where a step's cost is counted: no order is better
        return eps
    cost = torch.cdist(x.flatten(1).double(), eps.flatten(1).double()) ** 2
    for value in (c or {}).values():
        _, kind = value.flatten(1).unique(dim=0, return_inverse=True) if value.ndim > 1 else (None, value)
        cost = cost.masked_fill(kind[:, None] != kind, float("inf"))
    return eps[torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=eps.device)]
