"""VSD: variational score distillation. ProlificDreamer 2305.16213; SwiftBrush (one step) 2312.05239; PG-SB 2412.02687.

    x         = G(z, c),   x_t = alpha_t x + sigma_t eps
    g         = w_t ( eps_real^k(x_t) - eps_fake^k(x_t) ),   w_t = sigma_t^2 / (alpha_t^2 + sigma_t^2)
    L_student = x . g                                          g without gradient
    L_fake    = | eps_fake(x_t) - eps |^2                      in the network's own space, x without gradient

SwiftBrush: one k for teacher and fake, and a LoRA fake score. PG-SB: k ~ U(low, high) per sample, the same in both.
g is the gradient of KL(student || teacher) at level t, times sigma_t w_t / alpha_t. Entropic distillation (ESD): k of
the teacher 1, k of the fake 1 - lambda, `fake_guidance`. SwiftBrush's code weights L_fake by alpha_t^2, which is .005
at pure noise, although g uses times up to t = 980. The optimum is the same, so the default weights all levels equally.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.guidance import CFG, drop, scale_of
from distill.diffusion.schedule import expand
from distill.diffusion.times import Grid, TimeDistribution
from distill.losses import Reduction, denoising, gradient_surrogate, reduce, score_gap_logs
from distill.method import Batch, Logs, Method, Nets, Requirement, Update
from distill.random import Draw
from distill.ranges import Calls, Finite, UnitInterval


@dataclass(frozen=True)
class VSD(Method):
    """Score distillation with a fake score that follows the student: needs only prompts."""

    guidance: Finite | tuple[Finite, Finite] = 4.5  # k (SwiftBrush), or (low, high) of a random k (PG-SB: .5, 4)
    fake_guidance: Finite | None = (
        None  # k of the fake score; None: the teacher's (SwiftBrush, PG-SB); 1: DMD; 1 - lambda: ESD
    )
    p_drop: UnitInterval = 0.1  # fraction of null conditions in the fake's step, if k is not 1 (code: of batches)
    fake_steps: Calls = 1  # fake score steps per student step (SwiftBrush: 1)
    times: TimeDistribution = Grid(1000, 20, 980)  # distribution of t in the student's loss (SwiftBrush code)
    fake_times: TimeDistribution = Grid(1000, 0, 999)  # distribution of t in the fake score's loss (SwiftBrush code)
    reduction: Reduction = "mean"  # mean over all elements (SwiftBrush code)
    weight: bool = True  # weight by w_t; False: 1
    fake_weight: Literal["one", "alpha"] = "one"  # weight of the fake's error at t: 1, or alpha_t^2 (SwiftBrush code)

    roles = ("fake",)

    def __post_init__(self) -> None:
        if self.fake_weight not in ("one", "alpha"):
            raise ValueError(f"fake_weight is {self.fake_weight!r}; it must be 'one', or 'alpha' for alpha_t^2")

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return Requirement.select(NULL_CONDITION=self.guidance != 1 or self.fake_guidance not in (None, 1))

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss, self.fake_steps), Update("fake", self.fake_loss, reuse=True)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return nets.generate(batch, draw, 1 + draw.index("steps", len(nets.student.times)))

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        c = batch.get("c")
        path = nets.teacher.path
        k = scale_of(self.guidance, draw, len(x))
        k_fake = k if self.fake_guidance is None else self.fake_guidance
        with torch.no_grad():
            x_t, t, eps = self.times.diffuse(x, path, draw)
            real = CFG(nets.teacher, k)(x_t, t, c).eps
            fake = CFG(nets.fake_score, k_fake)(x_t, t, c).eps
            alpha, sigma = path.coefficients(t)
            w = expand(sigma**2 / (alpha**2 + sigma**2), x) if self.weight else 1.0
        own = not isinstance(k_fake, Tensor) and k_fake == 1
        return reduce(gradient_surrogate(x, w * (real - fake)), self.reduction), score_gap_logs(eps, real, fake, own)

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        c = batch.get("c")
        path = nets.fake_score.path
        if self.requirements:
            c = drop(c, nets.fake_score.null, draw.uniform("drop", (len(x),)) < self.p_drop)
        x_t, t, eps = self.fake_times.diffuse(x, path, draw)
        weight = expand(path.coefficients(t)[0] ** 2, x) if self.fake_weight == "alpha" else 1.0
        return denoising(nets.fake_score(x_t, t, c), x, eps, self.reduction, weight=weight), {}
