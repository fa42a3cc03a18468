"""Distributions of the time t of a loss. They are fields of a method, not properties of a schedule.

A law maps a named random draw to t [B] in [0, 1] of the denoiser's schedule. A law in sigma is converted by the
noise-to-signal ratio, so that it means the same noise levels on every schedule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from distill.diffusion.schedule import VP, Schedule
from distill.random import Draw
from distill.ranges import Count, Finite, Natural, Points, Positive, UnitInterval, Weight, validate_ranges

TASKS = 1000  # number of equally likely times of a law, from which clusters are formed


class TimeDistribution(ABC):
    """A distribution of t. `__call__(draw, name, B, schedule) -> t [B]`, float64, increasing with the random number."""

    @abstractmethod
    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        """t of B samples, from the random numbers with the name `name`."""

    def diffuse(self, x: Tensor, path: Schedule, draw: Draw, suffix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """x_t = alpha_t x + sigma_t eps [B, ...], its t [B] and its eps, from the random numbers "t" and "eps"."""
        t = self(draw, f"t{suffix}", len(x), path)
        eps = draw.normal(f"eps{suffix}", x.shape).to(x)
        return path.diffuse(x, eps, t), t, eps


@dataclass(frozen=True)
class Uniform(TimeDistribution):
    """t uniform in [low, high]."""

    low: UnitInterval = 0.02
    high: UnitInterval = 0.98

    def __post_init__(self) -> None:
        _validate_order(self, 1)

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return self.low + (self.high - self.low) * draw.uniform(name, (B,)).double()


@dataclass(frozen=True)
class Grid(TimeDistribution):
    """t = n / (N - 1) with n a uniform integer in low .. high, both included (DMD2: 20 .. 980 of 1000)."""

    N: Points = 1000
    low: Natural = 0
    high: Natural = 999

    def __post_init__(self) -> None:
        _validate_order(self, self.N - 1)

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return self.index(draw, name, B) / (self.N - 1)

    def index(self, draw: Draw, name: str, B: int) -> Tensor:
        """n [B]."""
        n = (draw.uniform(name, (B,)).double() * (self.high - self.low + 1)).floor() + self.low
        return n.clamp(max=self.high)


@dataclass(frozen=True)
class LogNormal(TimeDistribution):
    """sigma / alpha = exp(mean + std n), n standard normal (EDM: -1.2, 1.2)."""

    mean: Finite = -1.2
    std: Weight = 1.2

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return schedule.time((self.mean + self.std * draw.normal(name, (B,)).double()).exp())


@dataclass(frozen=True)
class StudentT(TimeDistribution):
    """sigma / alpha = exp(mean + std T) between `low` and `high`, T of Student's t with `df` degrees of freedom (TCM).

    With a small df its density falls as 1 / |log(sigma / alpha) - mean|: most of the probability is near `mean`, and
    all levels have some.
    """

    mean: Finite = 0.0
    std: Positive = 0.2
    df: Positive = 0.01
    low: Positive = 1.0
    high: Positive = 80.0

    def __post_init__(self) -> None:
        _validate_order(self, float("inf"))

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        from scipy.special import stdtr, stdtrit

        u = draw.uniform(name, (B,)).double()
        if u.is_meta:  # shapes only, for counting the cost of a step
            return u
        first, last = (stdtr(self.df, (math.log(s) - self.mean) / self.std) for s in (self.low, self.high))
        T = torch.as_tensor(stdtrit(self.df, (first + (last - first) * u).cpu().numpy()), device=u.device)
        return schedule.time((self.mean + self.std * T).exp())


@dataclass(frozen=True)
class Karras(TimeDistribution):
    """sigma / alpha on EDM's rho-grid, uniform in its index between the levels `low` and `high` (SiD: .002 .. 24.4)."""

    low: Weight = 0.002
    high: Positive = 80.0
    rho: Positive = 7.0

    def __post_init__(self) -> None:
        _validate_order(self, float("inf"))

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        low = self.low ** (1 / self.rho)
        high = self.high ** (1 / self.rho)
        return schedule.time((low + draw.uniform(name, (B,)).double() * (high - low)) ** self.rho)


@dataclass(frozen=True)
class LogitNormal(TimeDistribution):
    """t = sigmoid(mean + std n), n standard normal (SD3: 0, 1; SiD-DiT: log 2, 1.6)."""

    mean: Finite = 0.0
    std: Weight = 1.0

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return torch.sigmoid(self.mean + self.std * draw.normal(name, (B,)).double())


@dataclass(frozen=True)
class ShiftedTimes(TimeDistribution):
    """t -> s t / (1 + (s - 1) t) of another law: the resolution shift of flow models (SD3, section 5.3.2)."""

    law: TimeDistribution
    s: Positive = 3.0

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return shift(self.law(draw, name, B, schedule), self.s)


@dataclass(frozen=True)
class Clip(TimeDistribution):
    """t of another law, clamped to [low, high] (Self-Forcing, LightX2V: t after the shift)."""

    law: TimeDistribution
    low: UnitInterval = 0.02
    high: UnitInterval = 0.98

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"times from low = {self.low} to high = {self.high}; both lie in [0, 1], low below high")

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return self.law(draw, name, B, schedule).clamp(self.low, self.high)


@dataclass(frozen=True)
class Fixed(TimeDistribution):
    """The same t for every sample: for closed forms and diagnostics."""

    t: UnitInterval = 0.5

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        return torch.full((B,), self.t, dtype=torch.float64, device=draw.device)


@dataclass(frozen=True)
class StagedTimes(TimeDistribution):
    """Another law, starting with its noisiest times: low levels are the harder tasks (Kim et al. 2024, arXiv
    2403.10348).

    Stage n draws from the noisiest n of N clusters. The last stage draws from all clusters: it is the law itself. N = 1
    is the law itself, too. Clusters are intervals of the law that minimise the distance of log(sigma / alpha) from its
    median in the cluster. The paper ends a stage when the loss no longer falls. Here a stage lasts `every` steps, so
    that the step determines it.
    """

    law: TimeDistribution
    N: Points = 20  # number of clusters, at most 1000
    every: Count = 1000  # number of steps of a stage

    def __post_init__(self) -> None:
        validate_ranges(self)
        if self.N > TASKS:
            raise ValueError(f"N is {self.N}; a law has at most {TASKS} clusters")

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        n = draw.step // self.every + 1
        if n < self.N:
            low = clusters(self.law, self.N, schedule)[self.N - n]
            draw = RemappedDraw(draw, lambda u: low + (1 - low) * u)
        return self.law(draw, name, B, schedule)


class RemappedDraw(Draw):
    """A draw with uniform numbers f(u) in place of u. Normal numbers change by their cumulative probability."""

    def __init__(self, draw: Draw, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__(draw.seed, draw.step, draw.player, draw.samples)
        self.draw = draw
        self.f = f

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.f(self.draw.uniform(name, shape).double())

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.special.ndtri(self.f(torch.special.ndtr(self.draw.normal(name, shape).double())))


@lru_cache
def probability_below(law: TimeDistribution, t: float, schedule: Schedule) -> float:
    """The probability of a law at times up to t, by bisection. Every larger u gives a time above t.

    The law must be the same in every step (StagedTimes is not).
    """
    low = 0.0
    high = 1.0
    for _ in range(32):  # random numbers have 24 bits
        middle = (low + high) / 2
        low, high = (middle, high) if quantile(law, middle, schedule) <= t else (low, middle)
    return high


def quantile(law: TimeDistribution, u: float, schedule: Schedule) -> float:
    """The time below which a law has probability u."""
    draw = RemappedDraw(Draw(0, 0, "", torch.arange(1)), lambda old: torch.full_like(old, u))
    return float(law(draw, "", 1, schedule))


@lru_cache
def clusters(law: TimeDistribution, N: int, schedule: Schedule) -> tuple[float, ...]:
    """Cumulative probabilities 0 = q_0 < ... < q_N = 1 of a law at the borders of its N clusters, from clean to noisy.

    They minimise the sum over TASKS equally likely t of |y - the median y of its cluster|, y = log(sigma / alpha), by
    dynamic programming (SNR-based interval clustering: Go et al. 2023, arXiv 2306.00354).
    """
    u = (torch.arange(TASKS).double() + 0.5) / TASKS
    t = law(RemappedDraw(Draw(0, 0, "", torch.arange(TASKS)), lambda _: u), "", TASKS, schedule)
    y = schedule.ratio(t).clamp(1e-6, 1e6).log()
    total = torch.cat([y.new_zeros(1), y.cumsum(0)])
    j = torch.arange(TASKS + 1)[:, None]
    i = torch.arange(TASKS + 1)
    cost = total[i] + total[j] - total[(i + j) // 2] - total[(i + j + 1) // 2]  # of tasks i .. j - 1 as one cluster
    cost = cost.where(i < j, torch.inf)
    ends = []
    least = cost[:, 0]  # cost of the first 0 .. TASKS tasks in one cluster, in two, ...
    for _ in range(N - 1):
        least, start = (least + cost).min(1)
        ends.append(start)
    edges = [TASKS]
    for start in reversed(ends):
        edges.append(int(start[edges[-1]]))
    return tuple(edge / TASKS for edge in (0, *reversed(edges)))


def _validate_order(law: Uniform | Grid | Karras | StudentT, most: float) -> None:
    """ValueError unless 0 <= low <= high <= most."""
    validate_ranges(law)
    if not law.low <= law.high <= most:
        raise ValueError(f"times from low = {law.low} to high = {law.high}; both lie in [0, {most}], low below high")


def point(i: Tensor, N: int, path: Schedule) -> Tensor:
    """The time of point i = 0 .. N of a solver's grid of N steps: i / N.

    A table of L levels has integer timesteps: i L / N - 1, and 0 for i = 0, as in the code of LCM and PCM (L = 1000,
    N = 50: 0, 19, 39, ... 999). If N divides L - 1 they are i / N.
    """
    last = len(path.alphas_cumprod) - 1 if isinstance(path, VP) else N
    if last % N == 0:
        return i.double() / N
    return ((i.double() * (last + 1) / N).round() - 1).clamp(min=0) / last


def phase(i: Tensor, N: int, phases: int) -> tuple[Tensor, Tensor]:
    """The two ends of the phase of points i .. i + 1 of a grid: floor(m N / phases) and that of m + 1."""
    m = ((i.floor() + 1) * phases / N).ceil().clamp(max=phases) - 1
    return (m * N / phases).floor(), ((m + 1) * N / phases).floor()


def pieces(i: Tensor, N: int, times: tuple[float, ...], path: Schedule) -> Tensor:
    """The time of point i = 0 .. N of a grid that falls evenly from one of `times` to the next, and last to `point` 0.

    Each of `times` is the upper end of a `phase`. On a table all points are integer timesteps.
    """
    low, high = phase(i, N, len(times))
    last = len(path.alphas_cumprod) - 1 if isinstance(path, VP) else None
    base = -1 / last if last and last % N else 0.0  # same convention as `point`
    edges = _edges((base, *reversed(times)), i.device)
    m = (low * len(times) / N).ceil().long()
    t = torch.lerp(edges[m], edges[m + 1], (i - low) / (high - low))
    return t if last is None else (t * last).round().clamp(min=0) / last


@lru_cache
def _edges(times: tuple[float, ...], device: torch.device) -> Tensor:
    """It is copied to a device once, because the copy from the host waits for the device."""
    return torch.tensor(times, dtype=torch.float64, device=device)


def spread(steps: int, N: int, path: Schedule) -> tuple[float, ...]:
    """Times of `steps` points of that grid, spread evenly from its end as by LCMScheduler."""
    return tuple(point(torch.tensor([N - k * N // steps for k in range(steps)]), N, path).tolist())


def shift(t: Tensor, s: float) -> Tensor:
    """s t / (1 + (s - 1) t): sigma / alpha of rectified flow multiplied by s."""
    return s * t / (1 + (s - 1) * t)
