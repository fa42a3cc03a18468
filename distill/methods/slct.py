"""sLCT: improved training technique for latent consistency models. Dao et al. 2025, arXiv 2502.01441.

    L    = d( f(x_t, t) - sg f(x_r, r) ) / (s_t - s_r)  +  lambda |f(x_t, t) - x|^2 at the low levels       rest as CT
    d(y) = log( 1 + |y|^2 / (2 c^2) ),   c = exp(-1.18 ln N - 0.72)          N intervals of the curriculum's grid
    eps  : the normal noises of a micro-batch, assigned to the images of their condition so that sum |x - eps|^2 is
    least

Latents have outliers: d limits them, and c decreases as the levels approach each other. Coupled noise lowers the
variance of the targets; it depends on the other samples of the micro-batch. c, lambda and the fraction of low levels
are second-hand. The paper's LayerNorm without scale belongs to the network. Gradients flow as in CT.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.curriculum import ICTCurriculum
from distill.diffusion.denoiser import Condition
from distill.diffusion.schedule import EDM
from distill.losses import cauchy_norm
from distill.methods.ct import CT
from distill.random import Draw
from distill.ranges import UnitInterval, Weight


@dataclass(frozen=True)
class SLCT(CT):
    """Consistency training of latents: robust to outliers, with coupled noise and a denoising loss at low levels."""

    curriculum: ICTCurriculum = ICTCurriculum()
    distance: Literal["huber", "square", "cauchy"] = "cauchy"
    c: Weight = 1.0  # c, times exp(-1.18 ln N - 0.72) if it is adaptive
    adaptive: bool = True
    coupled: bool = True  # assign noise by optimal transport within the micro-batch: O(B^3), on the CPU
    diffusion: Weight = 1.0  # lambda, weight of the denoising loss
    early: UnitInterval = 0.25  # fraction of the grid, from its low end, with that loss

    def noise(self, x: Tensor, c: Condition, draw: Draw) -> Tensor:
        eps = super().noise(x, c, draw)
        return couple_noise(x, eps, c) if self.coupled else eps

    def sample_distance(self, delta: Tensor, draw: Draw) -> Tensor:
        if not self.adaptive or self.distance != "cauchy":
            return super().sample_distance(delta, draw)
        N = self.curriculum.intervals(draw.step)
        return cauchy_norm(delta, self.c * math.exp(-1.18 * math.log(N) - 0.72))

    def denoising_term(self, error: Tensor, s: Tensor) -> Tensor | float:
        if not self.diffusion:
            return 0.0
        grid = self.curriculum
        low = EDM(grid.low, grid.high, grid.rho).time(s) <= self.early
        return self.diffusion * low.to(error) * error.flatten(1).square().sum(1)


def couple_noise(x: Tensor, eps: Tensor, c: Condition = None) -> Tensor:
    """eps [B, ...] in the order of the least sum of |x - eps|^2: optimal transport between two batches.

    Each condition of c keeps its own noises. Otherwise noise would depend on the condition, but sampling starts from
    noise that does not.
    """
    from scipy.optimize import linear_sum_assignment

    if eps.is_meta:  # shapes only, for counting the cost of a step: the order does not matter
        return eps
    cost = torch.cdist(x.flatten(1).double(), eps.flatten(1).double()) ** 2
    for value in (c or {}).values():
        _, kind = value.flatten(1).unique(dim=0, return_inverse=True) if value.ndim > 1 else (None, value)
        cost = cost.masked_fill(kind[:, None] != kind, float("inf"))
    return eps[torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=eps.device)]
