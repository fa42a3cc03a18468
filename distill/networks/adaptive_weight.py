"""A learned weight of a loss: the log-variance l(s) of its error at level s, as in a normal distribution.

E [ e^-l(s) m(s) + l(s) ]  is least for  l(s) = log E m(s).  The minimum is  1 + E log E m(s).
The weighted error  e^-l(s) E m(s)  is then 1 for every s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distill.diffusion.schedule import expand
from distill.losses import Reduction, reduce


class LogVariance(nn.Module):
    """l [B] of levels s = sigma / alpha [B]: a sum of cosines in log s from e^-8 to e^8, 0 before training."""

    def __init__(self, waves: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(waves, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, s: Tensor) -> Tensor:
        like = self.linear.weight
        share = (s.log() / 16 + 0.5).clamp(0, 1).to(like)
        waves = torch.arange(like.shape[1], dtype=like.dtype, device=like.device)
        return self.linear((math.pi * share[:, None] * waves).cos())[:, 0]


def weigh(
    m: Tensor, s: Tensor, prior: bool, net: nn.Module | None, reduction: Reduction
) -> tuple[Tensor, dict[str, Tensor]]:
    """v e^-l m + l of squared errors m [B, ...] at levels s [B], and its log. v = 1 / s with `prior`, else 1. l =
    net(s), or 0."""
    m = m / expand(s, m) if prior else m
    if net is None:
        return reduce(m, reduction), {}
    l = expand(net(s), m)
    return reduce((-l).exp() * m, reduction) + l.mean(), {"log_variance": l.detach().mean()}
