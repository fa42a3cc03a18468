"""Moving average of a network's parameters. Its length is a half-life in images, or a relative width of all updates."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from distill.modules import copy_trainable
from distill.sharding import part


class EMA:
    """beta = 0.5^(batch / half-life). With `ramp` the half-life is at most ramp * images seen (Karras et al. 2022).

    half_life: in images; 0 means no average: `net` is the network itself. Parameters are averaged, buffers are copied.
    The averaged parameters stay float32. width: beta = (1 - 1 / n)^(gamma + 1) at update n = 1, 2, ... instead. The
    n-th weight is proportional to n^gamma, and its standard deviation is `width` of all updates (Karras et al. 2023,
    arXiv 2312.02696).
    """

    def __init__(self, net: nn.Module, half_life: float, ramp: float | None = None, width: float | None = None) -> None:
        if half_life < 0:
            raise ValueError(f"ema half_life is {half_life} images; it must be 0 (off) or more")
        self.half_life = half_life
        self.ramp = ramp
        self.gamma = None if width is None else exponent(width)
        self.follows: nn.Module | None = None
        self.net = net if half_life == 0 and width is None else copy_trainable(net).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, net: nn.Module, batch: int, seen: int, updates: int = 0) -> None:
        """Update the average after `batch` images. Before it: `seen` images were seen, and the average had `updates`
        steps."""
        if self.net is net:
            return
        beta = self.beta(batch, seen, updates)
        if self.follows is not net:  # traversing a large module tree costs milliseconds
            self.follows = net
            self.ours, self.theirs = unshared_parameters(self.net, net)
            self.buffers = list(zip(self.net.buffers(), net.buffers(), strict=True))
        torch._foreach_lerp_(self.ours, self.theirs, 1 - beta)
        for mine, new in self.buffers:
            mine.copy_(new)

    def beta(self, batch: int, seen: int, updates: int) -> float:
        """The factor of the old average in this step."""
        if self.gamma is not None:
            return (1 - 1 / (updates + 1)) ** (self.gamma + 1)
        half_life = self.half_life if self.ramp is None else min(self.half_life, self.ramp * seen)
        return 0.5 ** (batch / max(half_life, 1e-8))


def exponent(width: float) -> float:
    """gamma of weights n^gamma with standard deviation `width` of all n. It is positive if width < 12^-1/2.

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): the variance of n over the square of the largest n.
    """
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def unshared_parameters(net: nn.Module, other: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that two copies of a network do not share; a frozen backbone is shared. Sharded ones: local
    parts."""
    pairs = [(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True) if a is not b]
    return [part(a) for a, _ in pairs], [part(b) for _, b in pairs]


@torch.no_grad()
def move_towards(target: nn.Module, net: nn.Module, mu: float) -> None:
    """target <- mu target + (1 - mu) net: the averaged target network of a consistency loss."""
    torch._foreach_lerp_(*unshared_parameters(target, net), 1 - mu)
