"""Noise schedules x_t = alpha_t x_0 + sigma_t eps, and conversions of a network output to every kind of prediction.

Time t is in [0, 1]; t = 1 is noise. Coefficients are float64. One noise level has the same ratio sigma / alpha on every
schedule, so `time(ratio)` converts a time from one schedule to another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["x0", "eps", "v", "flow", "edm"]
KINDS: tuple[Kind, ...] = ("x0", "eps", "v", "flow", "edm")


def expand(a: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1] in x's precision (at least float32), so that it multiplies x [B, ...]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return a.to(x.device, dtype).reshape(-1, *[1] * (x.ndim - 1))


def ends(t: Tensor) -> Tensor:
    """t clamped to [0, 1] with derivative 1 at the ends, so that a tangent there does not depend on rounding."""
    held = t.clamp(0, 1)
    return torch.where((t - held).abs() < 1e-9, t + (held - t).detach(), held)


class Schedule(ABC):
    """A path from data (t = 0) to noise (t = 1). All methods take and return float64 tensors [B]."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t -> (alpha, sigma)."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """sigma / alpha in [0, inf] -> t, the inverse of `ratio`. Ratios outside the range give the nearest end."""

    @abstractmethod
    def native(self, t: Tensor) -> Tensor:
        """t -> the time input of networks trained on this schedule: an index, a sigma, an angle, ..."""

    def ratio(self, t: Tensor) -> Tensor:
        """t -> sigma / alpha, the noise-to-signal ratio, which names a level on every schedule."""
        alpha, sigma = self.coefficients(t)
        return sigma / alpha

    def diffuse(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x + sigma_t eps for x, eps [B, ...] and t [B]."""
        alpha, sigma = self.coefficients(t)
        return expand(alpha, x) * x + expand(sigma, x) * eps

    def transition(self, x: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Add noise to x_s up to level t >= s: x_t = (alpha_t / alpha_s) x_s + sigma_{t|s} eps."""
        a_s, s_s = self.coefficients(s)
        a_t, s_t = self.coefficients(t)
        a = a_t / a_s
        return expand(a, x) * x + expand((s_t**2 - (a * s_s) ** 2).clamp(min=0).sqrt(), x) * eps


@dataclass(frozen=True)
class VP(Schedule):
    """A table of N discrete variance-preserving levels (DDPM, Ho et al. 2020). t = n / (N - 1), native time n.

    log(sigma / alpha) is linear in t between two levels, so fractional times are well defined.
    """

    alphas_cumprod: tuple[float, ...]  # abar_n, decreasing, in (0, 1)
    _log_ratio: Tensor = field(init=False, repr=False, compare=False)
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        abar = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
        if abar.ndim != 1 or len(abar) < 2 or not ((abar > 0) & (abar < 1)).all() or not (abar.diff() < 0).all():
            raise ValueError("alphas_cumprod must be a decreasing table of at least two numbers inside (0, 1)")
        object.__setattr__(self, "_log_ratio", 0.5 * (torch.log1p(-abar) - abar.log()))

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, n: int = 1000) -> VP:
        """Stable Diffusion's table: square roots of beta linear from `beta_start` to `beta_end`."""
        beta = np.linspace(beta_start**0.5, beta_end**0.5, n) ** 2
        return cls(tuple(np.cumprod(1 - beta)))

    def _table(self, device: torch.device) -> Tensor:
        """log(sigma / alpha) of all levels. Copied to a device once: the copy from the host waits for the device."""
        if device not in self._copies:
            self._copies[device] = self._log_ratio.to(device)
        return self._copies[device]

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        n = self.native(t)
        table = self._table(t.device)
        low = n.detach().floor().long().clamp(0, len(table) - 2)
        lr = torch.lerp(table[low], table[low + 1], n - low)
        return torch.sigmoid(-2 * lr).sqrt(), torch.sigmoid(2 * lr).sqrt()

    def time(self, ratio: Tensor) -> Tensor:
        table = self._table(ratio.device)
        lr = ratio.double().log()
        low = (torch.searchsorted(table, lr.detach().contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        n = low + (lr - table[low]) / (table[low + 1] - table[low])
        return ends(n / (len(table) - 1))

    def native(self, t: Tensor) -> Tensor:
        n = t.double() * (len(self.alphas_cumprod) - 1)
        whole = n.round()
        return torch.where((n - whole).abs() < 1e-4, whole + (n - n.detach()), n)  # exactly n at t = n / (N - 1)


@dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1 and sigma on the rho-spaced grid of Karras et al. 2022 (eq. 5), t running from low to high noise."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low = self.sigma_min ** (1 / self.rho)
        high = self.sigma_max ** (1 / self.rho)
        sigma = (low + t.double() * (high - low)) ** self.rho
        return torch.ones_like(sigma), sigma

    def time(self, ratio: Tensor) -> Tensor:
        low = self.sigma_min ** (1 / self.rho)
        high = self.sigma_max ** (1 / self.rho)
        return ends((ratio.double() ** (1 / self.rho) - low) / (high - low))

    def native(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[1]


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow: alpha = 1 - t, sigma = t, native time `scale` * t. A model's shift is in times.ShiftedTimes."""

    scale: float = 1000.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t.double(), t.double()

    def time(self, ratio: Tensor) -> Tensor:
        return 1 - 1 / (1 + ratio.double())

    def native(self, t: Tensor) -> Tensor:
        return self.scale * t.double()


@dataclass(frozen=True)
class Trig(Schedule):
    """TrigFlow (Lu & Song 2024): alpha = cos, sigma = sigma_d sin of the angle theta = t pi / 2, the native time."""

    sigma_d: float = 1.0  # standard deviation of the data

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        theta = self.native(t)
        return theta.cos(), self.sigma_d * theta.sin()

    def time(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio.double() / self.sigma_d) * (2 / math.pi)

    def native(self, t: Tensor) -> Tensor:
        return t.double() * (math.pi / 2)


@dataclass(frozen=True)
class Prediction:
    """A network output `out` at x = alpha x0 + sigma eps, readable as any prediction (all float, shape of x).

    kind    out is
    x0      the clean sample                      eps     the noise
    v       alpha eps - sigma x0                  flow    eps - x0
    edm     F in x0 = c_skip x / alpha + c_out F, with c_skip = sigma_d^2 / (r^2 + sigma_d^2) and c_out = r sigma_d /
            sqrt(r^2 + sigma_d^2) at the ratio r = sigma / alpha (Karras et al. 2022, table 1)

    x0 and eps are explicit combinations of x and out, so neither divides by a vanishing sigma or alpha
    unless the kind itself does (eps at alpha = 0, x0 at sigma = 0).
    """

    out: Tensor
    kind: Kind
    x: Tensor
    alpha: Tensor  # [B, 1, ...]
    sigma: Tensor  # [B, 1, ...]
    sigma_d: float = 0.5

    @property
    def weight(self) -> Tensor | float:
        """Weight of the squared error between `out` and its target."""
        return 1.0

    def _norm(self) -> Tensor:
        """sqrt(sigma^2 + alpha^2 sigma_d^2), the standard deviation of x. It avoids a division by alpha."""
        return (self.sigma**2 + (self.alpha * self.sigma_d) ** 2).sqrt()

    @property
    def x0(self) -> Tensor:
        """The clean sample."""
        a = self.alpha
        s = self.sigma
        x = self.x
        out = self.out
        match self.kind:
            case "x0":
                return out
            case "eps":
                return (x - s * out) / a
            case "v":
                return (a * x - s * out) / (a**2 + s**2)
            case "flow":
                return (x - s * out) / (a + s)
            case "edm":
                norm = self._norm()
                return a * self.sigma_d**2 / norm**2 * x + s * self.sigma_d / norm * out
        raise ValueError(f"kind is {self.kind!r}; it must be one of {KINDS}")

    @property
    def eps(self) -> Tensor:
        """The noise."""
        a = self.alpha
        s = self.sigma
        x = self.x
        out = self.out
        match self.kind:
            case "x0":
                return (x - a * out) / s
            case "eps":
                return out
            case "v":
                return (s * x + a * out) / (a**2 + s**2)
            case "flow":
                return (x + a * out) / (a + s)
            case "edm":
                norm = self._norm()
                return s / norm**2 * x - a * self.sigma_d / norm * out
        raise ValueError(f"kind is {self.kind!r}; it must be one of {KINDS}")

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0 (Salimans & Ho 2022)."""
        return self.out if self.kind == "v" else self.alpha * self.eps - self.sigma * self.x0

    @property
    def flow(self) -> Tensor:
        """eps - x0, the velocity of rectified flow."""
        return self.out if self.kind == "flow" else self.eps - self.x0

    @property
    def score(self) -> Tensor:
        """grad_x log p_t(x) = -eps / sigma."""
        return -self.eps / self.sigma

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The target of `out` for x = alpha x0 + sigma eps, in the network's own space."""
        match self.kind:
            case "x0":
                return x0
            case "eps":
                return eps
            case "v":
                return self.alpha * eps - self.sigma * x0
            case "flow":
                return eps - x0
            case "edm":  # (x0 - c_skip x / alpha) / c_out without cancellation
                return (self.sigma * x0 - self.alpha * self.sigma_d**2 * eps) / (self.sigma_d * self._norm())
        raise ValueError(f"kind is {self.kind!r}; it must be one of {KINDS}")
