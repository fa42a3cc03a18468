"""The levels of a path above level s, as a path whose data is x_s (Phased DMD, arXiv 2510.27684).

x_t = alpha_{t|s} x_s + sigma_{t|s} eps. With the posterior mean of x_s, neither the score nor the loss that learns it
needs x_0. So a method that matches x_0 on a path matches x_s on the part above s without changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.schedule import Prediction, Schedule, ends, expand
from distill.diffusion.times import RemappedDraw, StagedTimes, TimeDistribution, probability_below
from distill.random import Draw
from distill.ranges import Decay


@dataclass(frozen=True)
class Interval(Schedule):
    """Levels s .. 1 of `base`. Its time u in [0, 1] is t = s + (1 - s) u; u = 0 has no noise.

    clamp: limit of the weight of the squared error, see IntervalPrediction.weight.
    """

    base: Schedule
    s: float  # in (0, 1)
    clamp: float = 10.0

    def outer(self, u: Tensor) -> Tensor:
        """u -> the time t of the whole path."""
        return self.s + (1 - self.s) * u.double()

    def inner(self, t: Tensor) -> Tensor:
        """The inverse of outer."""
        return ends((t - self.s) / (1 - self.s))

    def anchor(self) -> tuple[float, float]:
        """(alpha_s, sigma_s)."""
        alpha, sigma = self.base.coefficients(torch.tensor([self.s], dtype=torch.float64))
        return float(alpha), float(sigma)

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        a_s, s_s = self.anchor()
        a_t, s_t = self.base.coefficients(self.outer(u))
        a = a_t / a_s
        return a, (s_t**2 - (a * s_s) ** 2).clamp(min=0).sqrt()

    def time(self, ratio: Tensor) -> Tensor:
        a_s, s_s = self.anchor()
        return self.inner(self.base.time((ratio.double() ** 2 + s_s**2).sqrt() / a_s))

    def native(self, u: Tensor) -> Tensor:
        return self.base.native(self.outer(u))

    def to_interval(self, pred: Prediction, u: Tensor) -> IntervalPrediction:
        """A prediction of the whole path at outer(u), as a prediction of the interval."""
        a, b = (expand(one, pred.x) for one in self.coefficients(u))
        return IntervalPrediction(**vars(pred), a=a, b=b, anchor=self.anchor(), clamp=self.clamp)


@dataclass(frozen=True)
class IntervalPrediction(Prediction):
    """A prediction on an interval: x0 is the posterior mean of x_s, eps that of the noise since s.

    a, b: alpha_{t|s}, sigma_{t|s} [B, 1, ...]. alpha, sigma, x and out belong to the whole path.
    """

    a: Tensor | float = 1.0
    b: Tensor | float = 1.0
    anchor: tuple[float, float] = (1.0, 0.0)  # alpha_s, sigma_s
    clamp: float = 10.0

    @property
    def x0(self) -> Tensor:
        """E[x_s | x_t] = (a sigma_s^2 x_t + alpha_s b^2 E[x_0 | x_t]) / sigma_t^2."""
        a_s, s_s = self.anchor
        return (self.a * s_s**2 * self.x + a_s * self.b**2 * super().x0) / self.sigma**2

    @property
    def eps(self) -> Tensor:
        """(x_t - a E[x_s | x_t]) / b = (b / sigma_t) E[eps_0 | x_t]."""
        return self.b / self.sigma * super().eps

    @property
    def v(self) -> Tensor:
        return self.a * self.eps - self.b * self.x0

    @property
    def score(self) -> Tensor:
        return -super().eps / self.sigma

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The target of `out` for x = a x_s + b eps. Estimates with the same mean replace the unknown (x_0, eps_0).

        They are (sigma_t / b) eps for the noise, and x_s / alpha_s - alpha_t sigma_s^2 eps / (alpha_s^2 b) for x_0.
        """
        a_s, s_s = self.anchor
        b = torch.as_tensor(self.b).clamp(min=1e-6)  # the weight at s itself is 0
        return super().target(x0 / a_s - self.alpha * s_s**2 / (a_s**2 * b) * eps, self.sigma / b * eps)

    @property
    def weight(self) -> Tensor:
        """Weight of the squared error, min(1, clamp b^2): the variance of the target grows as 1 / b^2 towards s."""
        return (self.clamp * torch.as_tensor(self.b) ** 2).clamp(max=1)


@dataclass(frozen=True)
class Tail(TimeDistribution):
    """A law of the whole path restricted to t > s, as times of the Interval above s that it is called with.

    Its density is that of the law divided by its probability above s. `margin` is the fraction left out next to s.
    """

    law: TimeDistribution
    margin: Decay = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.law, StagedTimes):
            raise ValueError("a staged law changes from step to step, and a phase needs one law: leave StagedTimes out")

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        assert isinstance(schedule, Interval)
        low = probability_below(self.law, schedule.s, schedule.base)
        if low == 1:
            raise ValueError(f"{self.law} has no times above {schedule.s:.4g}, where the student's phase ends")
        low += self.margin * (1 - low)
        return schedule.inner(self.law(RemappedDraw(draw, lambda u: low + (1 - low) * u), name, B, schedule.base))
