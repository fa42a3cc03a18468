"""Solvers of the teacher's probability-flow ODE: one step, a whole trajectory, and several networks in turn.

A sampler is a list of calls. A call names a network with its guidance, a noise level, and the step from x to the
level of the next call. A sampler that uses several networks is a list of calls of several networks (`join_calls`):

    T-Stitch   a small network at the high levels, a large one below           Pan et al. 2024, arXiv 2402.14167
    hybrid     a base model's own steps, guided, then the last calls of its student     Gandikota & Bau 2025, 2503.10637
    experts    a student for each interval of levels                           Phased DMD, 2510.27684
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import Prediction, Schedule, expand

Step = Callable[[Denoiser | CFG, Tensor, Tensor, Tensor, Condition], Tensor]
Name = Literal["ddim", "heun", "cfg++"]


def ddim(denoiser: Denoiser | CFG, x: Tensor, t: Tensor, s: Tensor, c: Condition = None) -> Tensor:
    """x_t -> x_s by x_s = alpha_s x0 + sigma_s eps (Song et al. 2021): Euler's method in sigma / alpha."""
    pred = denoiser(x, t, c)
    return denoiser.path.diffuse(pred.x0, pred.eps, s)


def heun(denoiser: Denoiser | CFG, x: Tensor, t: Tensor, s: Tensor, c: Condition = None) -> Tensor:
    """x_t -> x_s by Heun's method in sigma / alpha (Karras et al. 2022, algorithm 1).

    Euler's method where alpha_t = 0 and, as in the paper, where sigma_s = 0: there is no noise to predict at x_0.
    """
    first = denoiser(x, t, c)
    euler = denoiser.path.diffuse(first.x0, first.eps, s)
    eps = (first.eps + denoiser(euler, s, c).eps) / 2
    a_t, s_t = denoiser.path.coefficients(t)
    a_s, s_s = denoiser.path.coefficients(s)
    twice = (a_t > 1e-6) & (s_s > 1e-12)
    gain = expand(a_s / torch.where(twice, a_t, 1.0), x)
    return torch.where(expand(twice, x).bool(), gain * (x - expand(s_t, x) * eps) + expand(s_s, x) * eps, euler)


def cfgpp(denoiser: Denoiser | CFG, x: Tensor, t: Tensor, s: Tensor, c: Condition = None) -> Tensor:
    """x_t -> x_s by x_s = alpha_s x0 + sigma_s eps with the guided x0 and the eps of the null condition (CFG++).

    The scale lambda in [0, 1] is the guidance scale of the denoiser, 1 without guidance. The step equals `ddim` with
    guidance scale lambda / (1 - e^-h), where h = log of the ratio sigma / alpha at t over that at s.
    Chung et al. 2024, arXiv 2406.08070.
    """
    guided = denoiser if isinstance(denoiser, CFG) else CFG(denoiser, 1.0)
    pred, empty = guided.predict_with_null(x, t, c)
    return guided.path.diffuse(pred.x0, empty.eps, s)


def renoising_step(noise: Callable[[Tensor], Tensor]) -> Step:
    """The step of students and consistency models, with new noise: x_s = alpha_s x0 + sigma_s noise(x_t)."""

    def step(denoiser: Denoiser | CFG, x: Tensor, t: Tensor, s: Tensor, c: Condition = None) -> Tensor:
        return denoiser.path.diffuse(denoiser(x, t, c).x0, noise(x), s)

    return step


def ancestral_shares(path: Schedule, t: Tensor, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(rho, sqrt(1 - rho^2)) [B, 1, ...]: the parts of the noise at t and of new noise in the noise at s <= t.

    rho = ratio(s) / ratio(t): x_s = alpha_s x0 + sigma_s (rho eps + sqrt(1 - rho^2) n) is of q(x_s | x_t, x0), the
    ancestral step (DDPM, Ho et al. 2020, eq. 6).
    """
    rho = path.ratio(s) / path.ratio(t)
    return expand(rho, x), expand((1 - rho**2).clamp(min=0).sqrt(), x)


def ancestral_step(noise: Callable[[Tensor], Tensor]) -> Step:
    """The ancestral step: x_s of q(x_s | x_t, x0) with new noise(x_t)."""

    def step(denoiser: Denoiser | CFG, x: Tensor, t: Tensor, s: Tensor, c: Condition = None) -> Tensor:
        pred = denoiser(x, t, c)
        old, new = ancestral_shares(denoiser.path, t, s, x)
        return denoiser.path.diffuse(pred.x0, old * pred.eps + new * noise(x), s)

    return step


def ddim_from_prediction(pred: Prediction, path: Schedule, e: Tensor | None) -> Tensor:
    """x_e = alpha_e x0 + sigma_e eps from one prediction, at e [B]. x0 where e is 0, and for None."""
    if e is None:
        return pred.x0
    return torch.where(expand(e, pred.x) > 0, path.diffuse(pred.x0, pred.eps, e), pred.x0)


STEPS: dict[str, Step] = {"ddim": ddim, "heun": heun, "cfg++": cfgpp}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the denoiser at time t of its own path. `step` takes x to the level of the next call."""

    denoiser: Denoiser | CFG
    t: float
    step: Step = ddim
    scale: float | None = None  # scale of the unit noise if this is the first call; None: sigma

    @property
    def noise_ratio(self) -> float:
        """sigma / alpha, which is the same on every path."""
        return float(self.denoiser.path.ratio(torch.tensor([self.t], dtype=torch.float64)))

    def on_schedule(self, path: Schedule) -> Call:
        """The same call with x and t of another path."""
        if self.denoiser.path == path:
            return self
        t = path.time(torch.tensor([self.noise_ratio], dtype=torch.float64))
        return replace(self, denoiser=self.denoiser.on_schedule(path), t=float(t))


def join_calls(first: Sequence[Call], then: Sequence[Call], skip: int) -> list[Call]:
    """The calls of `first` above the levels of `then[skip:]`, followed by `then[skip:]`.

    skip = len(then) returns `first` alone. ValueError if `first` has no call that replaces the skipped ones.
    """
    if not 0 <= skip <= len(then):
        raise ValueError(f"skip is {skip}, and there are {len(then)} calls: it must be 0 to {len(then)}")
    rest = then[skip:]
    level = rest[0].noise_ratio * (1 + 1e-6) if rest else -1.0
    before = [call for call in first if call.noise_ratio > level]
    if skip and not before:
        raise ValueError(
            f"skip is {skip}, and the first network has no call above the level that remains, sigma / alpha = "
            f"{level:.4g}, where it would start: skip more calls, or none"
        )
    return [*before, *rest]


def run_calls(turns: Sequence[Call], z: Tensor, c: Condition = None) -> Tensor:
    """Run all calls in turn from unit noise z, and return x0 [B, ...] of the last one.

    x belongs to the first call's path throughout. Networks of other schedules are evaluated on it.
    """
    path = turns[0].denoiser.path
    turns = [call.on_schedule(path) for call in turns]
    times = [torch.full((len(z),), call.t, dtype=torch.float64, device=z.device) for call in turns]
    x = z * (expand(path.coefficients(times[0])[1], z) if turns[0].scale is None else turns[0].scale)
    for call, t, s in zip(turns[:-1], times[:-1], times[1:], strict=True):
        x = call.step(call.denoiser, x, t, s, c)
    return turns[-1].denoiser(x, times[-1], c).x0


def calls(solver: Name, steps: int) -> int:
    """Network calls of `sample` without guidance: N for DDIM, 2 N - 1 for Heun. CFG++ makes two per step."""
    return steps if solver == "ddim" else 2 * steps - 1


@torch.no_grad()
def sample(denoiser: Denoiser | CFG, z: Tensor, c: Condition = None, steps: int = 18, solver: Name = "heun") -> Tensor:
    """Integrate from unit noise z [B, ...] at t = 1 down to t = 0 on a uniform grid of t, then x0 of the last step.

    steps >= 1; the last step is a plain x0 prediction. Costs `calls(solver, steps)` network evaluations.
    """
    if solver not in STEPS:
        raise ValueError(f"solver is {solver!r}; it must be one of {sorted(STEPS)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    times = torch.linspace(1, 0, steps, dtype=torch.float64).tolist() if steps > 1 else [1.0]
    return run_calls([Call(denoiser, t, STEPS[solver]) for t in times], z, c)
