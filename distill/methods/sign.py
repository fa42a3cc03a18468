"""SIGN: score-based idempotent distillation. Withdrawn submission 2025, no arXiv id. EXPERIMENTAL: L is reconstructed.

    f(u)      = D(scale u, T), untimed: u is noise z, data x, or x_t / sqrt(alpha_t^2 + sigma_t^2) between them
    L_dmd     = f(z) . g + lambda d( f(z'), y )         DMD's, with its fake score and its pairs of the teacher's ODE
    L_idem    = | f'(f(z)) - f(z) |^2                   f' is f with frozen weights (IGN, Shocher et al. 2023)
    L_rec     = | f(x) - x |^2                          of a real image x
    L_flow    = | f(u_t) - sg f(u_s) |^2                x_s is one step of the guided teacher from x_t, s = t - 1 / N
    L_denoise = | f(u_t) - x |^2                        t in [0, t_max]: corrupted data are projected
    L         = L_dmd + their weighted sum;  means over all elements

We have not seen the equation with these six terms: they follow its description, and the weights are ours. Gradients
flow through every f without sg, and through f' to its input.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.diffusion.denoiser import Condition
from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import expand
from distill.diffusion.solver import STEPS, Name
from distill.diffusion.times import Grid, Uniform
from distill.losses import reduce
from distill.method import Batch, Logs, Nets, Requirement
from distill.methods.dmd import DMD
from distill.random import Draw
from distill.ranges import Points, UnitInterval, Weight


@dataclass(frozen=True)
class SIGN(DMD):
    """DMD of a generator that maps data and its own samples to themselves: needs images."""

    regression: Weight = 0.0  # lambda, weight of the regression; above 0 it needs pairs
    idem: Weight = 1.0
    rec: Weight = 1.0
    flow: Weight = 1.0
    denoise: Weight = 1.0
    N: Points = 50  # number of ODE steps from t = 1 to 0 in L_flow
    solver: Name = "ddim"
    t_max: UnitInterval = 0.3  # upper limit of t in L_denoise

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("fake", "target") if self.idem else ("fake",)

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return super().requirements + Requirement.select(REAL=self.rec or self.flow or self.denoise)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        loss, logs = super().student_loss(x, nets, batch, draw)
        gaps = {}
        if self.idem:
            assert nets.target is not None
            gaps["idem"] = replace(nets.student, denoiser=nets.target).generate(x, batch.get("c"), steps=1) - x
        y = batch.get("real", x)
        c = batch.get("real_c")
        if self.rec:
            gaps["rec"] = nets.student.generate(y, c, steps=1) - y
        if self.flow:
            gaps["flow"] = self.flow_gap(y, nets, c, draw)
        if self.denoise:
            x_t, t, _ = Uniform(0.0, self.t_max).diffuse(y, nets.teacher.path, draw, "_denoise")
            gaps["denoise"] = self.project(x_t, t, nets, c) - y
        for name, gap in gaps.items():
            logs[name] = reduce(gap**2, self.reduction)
            loss = loss + getattr(self, name) * logs[name]
        return loss, logs

    def flow_gap(self, y: Tensor, nets: Nets, c: Condition, draw: Draw) -> Tensor:
        x_t, t, _ = Grid(self.N + 1, 1, self.N).diffuse(y, nets.teacher.path, draw, "_flow")
        s = t - 1 / self.N
        with torch.no_grad():
            x_s = STEPS[self.solver](CFG(nets.teacher, self.guidance), x_t, t, s, c)
            target = self.project(x_s, s, nets, c)
        return self.project(x_t, t, nets, c) - target

    def project(self, x_t: Tensor, t: Tensor, nets: Nets, c: Condition) -> Tensor:
        alpha, sigma = nets.teacher.path.coefficients(t)
        return nets.student.generate(x_t / expand(torch.hypot(alpha, sigma), x_t), c, steps=1)

    def after_student_step(self, nets: Nets) -> None:
        nets.update_target(0.0)
