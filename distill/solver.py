"""Solvers of the teacher's probability-flow ODE: one step, and a whole trajectory from noise to data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.guidance import Guided
from distill.schedule import Prediction, Schedule, expand

Step = Callable[[Denoiser | Guided, Tensor, Tensor, Tensor, Condition], Tensor]
Name = Literal["ddim", "heun"]


def ddim(denoiser: Denoiser | Guided, x: Tensor, t: Tensor, s: Tensor, c: Condition = None) -> Tensor:
    """x_t -> x_s by x_s = alpha_s x0 + sigma_s eps (Song et al. 2021): Euler's method in sigma / alpha."""
    pred = denoiser(x, t, c)
    return denoiser.path.diffuse(pred.x0, pred.eps, s)


def heun(denoiser: Denoiser | Guided, x: Tensor, t: Tensor, s: Tensor, c: Condition = None) -> Tensor:
    """x_t -> x_s by Heun's method in sigma / alpha (Karras et al. 2022, algorithm 1).

    Euler's where alpha_t = 0, and, as there, where sigma_s = 0: a network has no noise to predict at x_0.
    """
    first = denoiser(x, t, c)
    euler = denoiser.path.diffuse(first.x0, first.eps, s)
    eps = (first.eps + denoiser(euler, s, c).eps) / 2
    (a_t, s_t), (a_s, s_s) = denoiser.path.coefficients(t), denoiser.path.coefficients(s)
    twice = (a_t > 1e-6) & (s_s > 1e-12)
    gain = expand(a_s / torch.where(twice, a_t, 1.0), x)
    return torch.where(expand(twice, x).bool(), gain * (x - expand(s_t, x) * eps) + expand(s_s, x) * eps, euler)


def jump(pred: Prediction, path: Schedule, e: Tensor | None) -> Tensor:
    """x_e = alpha_e x0 + sigma_e eps of one prediction, at e [B]; x0 where e is 0, and for None."""
    if e is None:
        return pred.x0
    return torch.where(expand(e, pred.x) > 0, path.diffuse(pred.x0, pred.eps, e), pred.x0)


STEPS: dict[str, Step] = {"ddim": ddim, "heun": heun}


def calls(solver: Name, steps: int) -> int:
    """Network evaluations of `sample`: N for DDIM, 2 N - 1 for Heun."""
    return steps if solver == "ddim" else 2 * steps - 1


@torch.no_grad()
def sample(
    denoiser: Denoiser | Guided, z: Tensor, c: Condition = None, steps: int = 18, solver: Name = "heun"
) -> Tensor:
    """Integrate from unit noise z [B, ...] at t = 1 down to t = 0 on a uniform grid of t, then x0 of the last step.

    steps >= 1; the last step is a plain x0 prediction. Costs `calls(solver, steps)` network evaluations.
    """
    if solver not in STEPS:
        raise ValueError(f"solver is {solver!r}; it must be one of {sorted(STEPS)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    t = torch.linspace(1, 0, steps, dtype=torch.float64, device=z.device) if steps > 1 else torch.ones(1).double()
    t = t[:, None].expand(-1, len(z)).to(z.device)
    x = expand(denoiser.path.coefficients(t[0])[1], z) * z
    for i in range(steps - 1):
        x = STEPS[solver](denoiser, x, t[i], t[i + 1], c)
    return denoiser(x, t[-1], c).x0
