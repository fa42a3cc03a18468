"""Exponential moving average of a network's parameters, its horizon a half-life in images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.lora import twin
from distill.shard import part


class EMA:
    """beta = 0.5^(batch / half-life); with `ramp`, the half-life is at most ramp * images seen (Karras et al. 2022).

    half_life in images; 0 is no average: `net` is the network itself. Parameters are averaged, buffers copied; masters
    stay float32.
    """

    def __init__(self, net: nn.Module, half_life: float, ramp: float | None = None) -> None:
        if half_life < 0:
            raise ValueError(f"ema half_life is {half_life} images; it must be 0 (off) or more")
        self.half_life, self.ramp = half_life, ramp
        self.follows: nn.Module | None = None
        self.net = net if half_life == 0 else twin(net).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, net: nn.Module, batch: int, seen: int) -> None:
        """One step after `batch` images, `seen` images before it."""
        if self.net is net:
            return
        half_life = self.half_life if self.ramp is None else min(self.half_life, self.ramp * seen)
        beta = 0.5 ** (batch / max(half_life, 1e-8))
        if self.follows is not net:  # walking a large module tree costs milliseconds
            self.follows = net
            self.ours, self.theirs = apart(self.net, net)
            self.buffers = list(zip(self.net.buffers(), net.buffers(), strict=True))
        torch._foreach_lerp_(self.ours, self.theirs, 1 - beta)
        for mine, new in self.buffers:
            mine.copy_(new)


def apart(net: nn.Module, other: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that two copies of a network do not share, a frozen backbone say; of sharded ones our parts."""
    pairs = [(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True) if a is not b]
    return [part(a) for a, _ in pairs], [part(b) for _, b in pairs]


@torch.no_grad()
def follow(target: nn.Module, net: nn.Module, mu: float) -> None:
    """target <- mu target + (1 - mu) net: the average that a consistency loss takes for its target."""
    torch._foreach_lerp_(*apart(target, net), 1 - mu)
