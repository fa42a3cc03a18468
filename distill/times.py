"""Distributions of the time t at which a loss looks: fields of a method, never a property of a schedule.

A law maps a named random draw to t [B] in [0, 1] of the denoiser's schedule. Laws written in sigma are carried over by
the noise-to-signal ratio, so one law means the same levels of noise on every schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.ranges import Count, Finite, Natural, Positive, Share, Weight, check
from distill.schedule import Schedule

if TYPE_CHECKING:
    from distill.draw import Draw


class Law(ABC):
    """A distribution of t. `__call__(draw, name, B, schedule) -> t [B]`, float64."""

    @abstractmethod
    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        """t of B samples, from the random numbers called `name`."""


@dataclass(frozen=True)
class Uniform(Law):
    """t uniform in [low, high]."""

    low: Share = 0.02
    high: Share = 0.98

    def __post_init__(self) -> None:
        _ordered(self, 1)

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return self.low + (self.high - self.low) * draw.uniform(name, (B,)).double()


@dataclass(frozen=True)
class Grid(Law):
    """t = n / (N - 1) with n a uniform integer in low .. high, both included (DMD2: 20 .. 980 of 1000)."""

    N: Count = 1000
    low: Natural = 0
    high: Natural = 999

    def __post_init__(self) -> None:
        _ordered(self, self.N - 1)

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        n = (draw.uniform(name, (B,)).double() * (self.high - self.low + 1)).floor() + self.low
        return n.clamp(max=self.high) / (self.N - 1)


@dataclass(frozen=True)
class LogNormal(Law):
    """sigma / alpha = exp(mean + std n), n standard normal (EDM: -1.2, 1.2)."""

    mean: Finite = -1.2
    std: Weight = 1.2

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return schedule.time((self.mean + self.std * draw.normal(name, (B,)).double()).exp())


@dataclass(frozen=True)
class Karras(Law):
    """sigma / alpha on EDM's rho-grid, uniform in its index between the levels `low` and `high` (SiD: .002 .. 24.4)."""

    low: Weight = 0.002
    high: Positive = 80.0
    rho: Positive = 7.0

    def __post_init__(self) -> None:
        _ordered(self, float("inf"))

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        low, high = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        return schedule.time((low + draw.uniform(name, (B,)).double() * (high - low)) ** self.rho)


@dataclass(frozen=True)
class LogitNormal(Law):
    """t = sigmoid(mean + std n), n standard normal (SD3: 0, 1; SiD-DiT: log 2, 1.6)."""

    mean: Finite = 0.0
    std: Weight = 1.0

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return torch.sigmoid(self.mean + self.std * draw.normal(name, (B,)).double())


@dataclass(frozen=True)
class Shifted(Law):
    """t -> s t / (1 + (s - 1) t) of another law: the resolution shift of flow models (SD3, section 5.3.2)."""

    law: Law
    s: Positive = 3.0

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return shift(self.law(draw, name, B, schedule), self.s)


@dataclass(frozen=True)
class Fixed(Law):
    """The same t for every sample: for closed forms and diagnostics."""

    t: Share = 0.5

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return torch.full((B,), self.t, dtype=torch.float64, device=draw.device)


def _ordered(law: Uniform | Grid | Karras, most: float) -> None:
    """ValueError unless 0 <= low <= high <= most."""
    check(law)
    if not law.low <= law.high <= most:
        raise ValueError(f"times from low = {law.low} to high = {law.high}; both lie in [0, {most}], low below high")


def shift(t: Tensor, s: float) -> Tensor:
    """s t / (1 + (s - 1) t): sigma / alpha of rectified flow multiplied by s."""
    return s * t / (1 + (s - 1) * t)
