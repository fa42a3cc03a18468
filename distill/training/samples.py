"""Sources of an update's samples: new samples, those of an earlier update, or a continued generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill.method import Method
from distill.random import Draw
from distill.roles import Batch, Nets
from distill.training.step import steps_into_generation


class MicroBatch(NamedTuple):
    """Everything that the loss of a micro-batch depends on, except the weights.

    x: the samples [B, *shape]. source: the random numbers of x; None: x is of an earlier update.
    """

    x: Tensor
    batch: Batch
    numbers: Draw
    source: Draw | None

    def detach(self) -> MicroBatch:
        return self._replace(x=self.x.detach())


@dataclass(eq=False)
class SampleSource:
    """Makes the micro-batches of a method.

    data(draw) -> batch. draw: source of random numbers, called as draw(seed, step, player, samples [B]).
    """

    method: Method
    nets: Nets
    data: Callable[[Draw], Batch]
    draw: Callable[..., Draw]
    seed: int

    def new(self, player: str, numbers: Draw) -> MicroBatch:
        """Generate new samples."""
        batch = self.data(numbers)
        return MicroBatch(self._sample(player, batch, numbers), batch, numbers, numbers)

    @staticmethod
    def reused(earlier: MicroBatch, numbers: Draw) -> MicroBatch:
        """The detached samples of an earlier update of the same step."""
        return MicroBatch(earlier.x, earlier.batch, numbers, None)

    def continued(self, player: str, numbers: Draw, step: int, indices: Tensor, last: MicroBatch | None) -> MicroBatch:
        """Samples after one more call in the generation of the previous step (Update.walk).

        indices [B]: indices of the samples in the global batch. last: the micro-batch of the previous step. None: the
        run was resumed, and the generation is repeated from its beginning.
        """
        batch = self.data(numbers)
        late = steps_into_generation(self.method, self.nets, step)
        source = self.draw(self.seed, step - late, player, indices)
        source.late = late
        if late:
            start = self.data(source) if last is None else last.batch
            source.before = None if last is None else last.x
            batch = batch | {"c": start.get("c")}
        return MicroBatch(self._sample(player, batch, source), batch, numbers, source)

    def _sample(self, player: str, batch: Batch, source: Draw) -> Tensor:
        with torch.set_grad_enabled(player == "student"):
            return self.method.sample(self.nets, batch, source)


@torch.no_grad()
def describe_samples(x: Tensor) -> dict[str, Tensor]:
    """Logs of a student's samples [B, ...]: mean rms, and mean rms distance of two samples over sqrt(2).

    Both are per element. The second is 0 if all samples are equal. It compares neighbours, so that micro-batches of
    even size give the value of the whole batch. A single sample has none.
    """
    x = x.float().flatten(1)
    pairs = x[: len(x) // 2 * 2].unflatten(0, (-1, 2))
    logs = {"x_rms": x.square().mean(1).sqrt().mean()}
    return logs | ({"x_spread": (pairs.diff(dim=1).square().mean((1, 2)) / 2).sqrt().mean()} if len(pairs) else {})
