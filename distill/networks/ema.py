"""Moving average of a network's parameters: its horizon is a half-life in images, or a share of all updates."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from distill.modules import copy_trainable
from distill.sharding import part


class EMA:
    """beta = 0.5^(batch / half-life); with `ramp`, the half-life is at most ramp * images seen (Karras et al. 2022).

    half_life in images; 0 is no average: `net` is the network itself. Parameters are averaged, buffers copied; masters
    stay float32.

    width: in place of the half-life, beta = (1 - 1 / n)^(gamma + 1) at update n = 1, 2, ... The n-th weight grows as
    n^gamma, and its standard deviation is `width` of all updates (Karras et al. 2023, arXiv 2312.02696).
    """

    def __init__(self, net: nn.Module, half_life: float, ramp: float | None = None, width: float | None = None) -> None:
        if half_life < 0:
            raise ValueError(f"ema half_life is {half_life} images; it must be 0 (off) or more")
        self.half_life, self.ramp = half_life, ramp
        self.gamma = None if width is None else exponent(width)
        self.follows: nn.Module | None = None
        self.net = net if half_life == 0 and width is None else copy_trainable(net).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, net: nn.Module, batch: int, seen: int, updates: int = 0) -> None:
        """One step after `batch` images; before it `seen` images were seen, and the average had `updates` steps."""
        if self.net is net:
            return
        beta = self.beta(batch, seen, updates)
        if self.follows is not net:  # walking a large module tree costs milliseconds
            self.follows = net
            self.ours, self.theirs = unshared_parameters(self.net, net)
            self.buffers = list(zip(self.net.buffers(), net.buffers(), strict=True))
        torch._foreach_lerp_(self.ours, self.theirs, 1 - beta)
        for mine, new in self.buffers:
            mine.copy_(new)

    def beta(self, batch: int, seen: int, updates: int) -> float:
        """The share of the average that this step keeps."""
        if self.gamma is not None:
            return (1 - 1 / (updates + 1)) ** (self.gamma + 1)
        half_life = self.half_life if self.ramp is None else min(self.half_life, self.ramp * seen)
        return 0.5 ** (batch / max(half_life, 1e-8))


def exponent(width: float) -> float:
    """gamma of weights n^gamma whose standard deviation is `width` of all n: it is above 0 where width < 12^-1/2.

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the variance of n over the square of the largest n.
    """
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def unshared_parameters(net: nn.Module, other: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that two copies of a network do not share, a frozen backbone say; of sharded ones our parts."""
    pairs = [(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True) if a is not b]
    return [part(a) for a, _ in pairs], [part(b) for _, b in pairs]


@torch.no_grad()
def follow(target: nn.Module, net: nn.Module, mu: float) -> None:
    """target <- mu target + (1 - mu) net: the average that a consistency loss takes for its target."""
    torch._foreach_lerp_(*unshared_parameters(target, net), 1 - mu)
