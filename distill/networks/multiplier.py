"""The Lagrange multiplier of a constraint E L <= xi, by dual ascent: lambda <- max(0, lambda + eta (E L - xi))."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DUAL = "multiplier."  # prefix of its tensors in a network


class Multiplier(nn.Module):
    """lambda >= 0, a buffer of the network that it is a child of. Checkpoints contain it, exports do not.

    Call `record` with the loss of every micro-batch; `step` then updates lambda with their mean over all processes.
    """

    value: Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(float(value)), persistent=False)
        self.losses: list[Tensor] = []
        self.at: int | None = None

    def record(self, loss: Tensor, step: int) -> None:
        """Record the loss of a micro-batch of a step. Losses of an update that was skipped are discarded."""
        if step != self.at:
            self.at = step
            self.losses = []
        self.losses.append(loss.detach().float())

    @torch.no_grad()
    def step(self, rate: float, bound: float) -> None:
        """lambda <- max(0, lambda + rate (mean - bound))."""
        from accelerate.utils import reduce

        mean = reduce(torch.stack(self.losses).mean(), "mean")
        self.value.copy_((self.value + rate * (mean - bound)).clamp(min=0))


def multiplier(net: nn.Module) -> Multiplier:
    """The multiplier of a network."""
    found = net.get_submodule("multiplier")
    assert isinstance(found, Multiplier)
    return found
