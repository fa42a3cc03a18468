"""The distance between the two noise levels of consistency training. It shrinks during training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.schedule import EDM, Schedule
from distill.diffusion.times import LogNormal, TimeDistribution
from distill.random import Draw
from distill.ranges import Count, Finite, Positive, Weight, validate_ranges


class Curriculum(ABC):
    """Pairs of times of a schedule, defined by their levels s = sigma / alpha."""

    @abstractmethod
    def __call__(self, draw: Draw, B: int, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        """(t, r, s_t - s_r), float64 [B], at step `draw.step`, from the random numbers with the name "t".

        r < t. The sample at r = 0 is clean.
        """


@dataclass(frozen=True)
class ECTCurriculum(Curriculum):
    """s_r = s_t max(0, 1 - n(s_t) / q^(stage + 1)), n(s) = 1 + k sigmoid(-b s) (ECT, section 3.2 and code).

    In the first stages s_r is 0, so that training is denoising.
    """

    times: TimeDistribution = LogNormal(-1.1, 2.0)  # distribution of t (CIFAR-10; ImageNet-64 -0.8, 1.6)
    q: Positive = 2.0  # above 1; 256: short runs of one stage; 4 ImageNet-64
    k: Weight = 8.0
    b: Weight = 1.0
    every: Count = 25_000  # number of steps of a stage (code: 3.2 M images in batches of 128)

    def __post_init__(self) -> None:
        validate_ranges(self)
        if self.q <= 1:
            raise ValueError(f"q is {self.q}; it must be above 1: the two levels draw together by q^-stage")

    def __call__(self, draw: Draw, B: int, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        return self.pairs_below(self.times(draw, "t", B, schedule), draw.step, schedule)

    def pairs_below(self, t: Tensor, step: int, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs at `step` with the upper times t [B]."""
        s = schedule.ratio(t)
        s_r = s * self.level_ratio(s, step)
        return t, schedule.time(s_r), s - s_r

    def level_ratio(self, s: Tensor, step: int) -> Tensor:
        """s_r / s_t at levels s [B]."""
        n = 1 + self.k * torch.sigmoid(-self.b * s)
        return (1 - n / self.q ** (step // self.every + 1)).clamp(min=0)


@dataclass(frozen=True)
class ICTCurriculum(Curriculum):
    """Neighbours of EDM's rho-grid of N + 1 levels. N = n_0, 2 n_0, 4 n_0, ... n_1, each for the same part of `steps`.

    The upper level follows a log-normal law rounded to the grid. Its probability is Phi(upper level) - Phi(lower level)
    (iCT, table 1).
    """

    n_0: Count = 10
    n_1: Count = 1280
    steps: Count = 400_000  # number of steps of the run: 400k CIFAR-10, 800k ImageNet-64
    low: Positive = 0.002
    high: Positive = 80.0
    rho: Positive = 7.0
    mean: Finite = -1.1  # mean of ln s
    std: Positive = 2.0

    def __post_init__(self) -> None:
        validate_ranges(self)
        if not self.low < self.high or not self.n_0 <= self.n_1:
            raise ValueError(
                f"levels from low = {self.low} to high = {self.high}, their number from n_0 = {self.n_0} to n_1 = "
                f"{self.n_1}; each must rise"
            )

    def intervals(self, step: int) -> int:
        """N at `step`."""
        stages = int(math.log2(self.n_1 / self.n_0)) + 1
        return min(self.n_0 << min(step // max(1, self.steps // stages), stages), self.n_1)

    def __call__(self, draw: Draw, B: int, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        u = draw.uniform("t", (B,)).double()
        s, share = self.grid(draw.step, schedule)
        s = s.to(u.device)
        share = share.to(u.device)
        i = torch.searchsorted(share, u, right=True).clamp(1, len(s) - 1)
        r = torch.where(i == 1, 0.0, schedule.time(s[i - 1]))
        return schedule.time(s[i]), r, s[i] - s[i - 1]

    def grid(self, step: int, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """The N + 1 levels at `step` within the schedule's range, and the probability of pairs up to each."""
        first, last = (float(end) for end in schedule.ratio(torch.tensor([0.0, 1.0]).double()))
        grid = EDM(max(self.low, first), min(self.high, last), self.rho)
        s = grid.ratio(torch.linspace(0, 1, self.intervals(step) + 1, dtype=torch.float64))
        share = torch.special.ndtr((s.log() - self.mean) / self.std)
        return s, (share - share[0]) / (share[-1] - share[0])
