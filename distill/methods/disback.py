"""DisBack: distribution backtracking. Zhang et al. 2024, arXiv 2408.15991.

    Record:  s'_0 = the teacher learns the samples of the initial student G_0, which stays as it is:
             L = | D_{s'}(x_t) - x |^2,   x = G_0(z, c);   checkpoints s'_1, ..., s'_N
    Go back: DMD2 whose fake score starts as s'_N and whose teacher is s'_{N-1}, ..., s'_1, `interval` iterations each,
             and then s'_0, the teacher itself, for the rest

Early in training the teacher is called far from its data, where its score can be wrong. The recorded checkpoints are
right there. This helps if the initial student is far from the data. Where the teacher's score is right, DisBack is
slower than DMD2, whose first target is the last one: so it is off unless `record` is set. With N = 1 it is DMD2.
Gradients flow as in DMD2.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from distill.diffusion.times import Grid, TimeDistribution
from distill.method import Batch, Logs, Method, Nets, Update
from distill.methods.dmd2 import DMD2
from distill.random import Draw
from distill.ranges import Count


@dataclass(frozen=True)
class Degradation(Method):
    """The first stage of DisBack: a copy of the teacher learns the samples of the untrained student."""

    fake_times: TimeDistribution = Grid(1000, 0, 999)  # t in the denoising loss, a mean over all elements

    roles = ("fake",)

    def updates(self) -> list[Update]:
        return [Update("fake", self.fake_loss)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return nets.generate(batch, draw, 1 + draw.index("steps", len(nets.student.times)))

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return DMD2(gan=0, gan_fake=0, fake_times=self.fake_times).fake_loss(x, nets, batch, draw)


@dataclass(frozen=True)
class DisBack(DMD2):
    """DMD2 towards the checkpoints of the teacher's degradation in reverse order, then towards the teacher."""

    record: str | None = None  # folder of the run of Degradation; None: DMD2
    interval: Count = 1000  # iterations towards each recorded teacher (code)

    @property
    def roles(self) -> tuple[str, ...]:
        return super().roles + (("past",) if self.record else ())

    @property
    def degradation_run(self) -> Path | None:
        return Path(self.record) if self.record else None  # its checkpoints are s'_1, ..., s'_N

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return super().student_loss(x, self.with_stage_teacher(nets, draw.step), batch, draw)

    def with_stage_teacher(self, nets: Nets, step: int) -> Nets:
        """The roles with the teacher of this iteration."""
        if nets.past is None:
            return nets
        i = len(nets.past.folders) - 2 - step // self.interval  # index of s'_{i + 1}
        return replace(nets, teacher=nets.past(i)) if i >= 0 else nets
