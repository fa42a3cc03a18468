"""BOOT: data-free distillation of denoising diffusion models with bootstrapping. Gu et al. 2023, arXiv 2306.05544.

    y_t = (x_t - sigma_t z) / alpha_t      the signal on the teacher's trajectory from noise z;   y_0 is its sample
    dy/dlambda = D(x_t) - y_t,   lambda = log(alpha / sigma)                                      the signal ODE
    y_s' = (x_s - sigma_s z) / alpha_s,   x_s one solver step of D^k from x_t = alpha_t y(z, t) + sigma_t z
         = y_t + w (D^k(x_t) - y_t) with DDIM,     w = 1 - exp(lambda_t - lambda_s),     s = t - T / N
    L = | y(z, s) - sg(y_s') |^2 / w^2 + beta | y(z, T) - D^k(sigma_T z, T) |^2       the second is the boundary
    D^k = D(null) + k (D(c) - D(null));   means over all elements

y(z, s) is the student's first call, at its time T, with second time s / T (end_time.py). The student starts as the
teacher, which is the boundary. A call without a second time is y(z, 0). (The paper's network gets s in place of T.)
Gradients flow only through y(z, s) and y(z, T).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.end_time import with_end_key
from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import expand
from distill.diffusion.solver import STEPS, Name
from distill.losses import Reduction, reduce
from distill.method import Batch, Logs, Method, Nets, Requirement, Update, guidance_requirements
from distill.random import Draw
from distill.ranges import Finite, Points, Weight


@dataclass(frozen=True)
class BOOT(Method):
    """Bootstrapping along the teacher's ODE from noise to sample: data-free, one step."""

    N: Points = 25  # number of steps of s; a step is T / N (paper: .04)
    guidance: Finite = 1.0  # guidance scale k of the teacher
    solver: Name = "ddim"  # ODE solver of the step (paper: both)
    boundary: Weight = 0.5  # beta, weight of the boundary loss
    reduction: Reduction = "mean"

    noises = ()  # it trains only the first call

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return (Requirement.END_TIME, *guidance_requirements(self.guidance, self.solver))

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss)]

    def times(self, nets: Nets, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """t, s and T [B]: t is uniform in [T / N, T]."""
        u = draw.uniform("t", (len(draw.samples),)).double()
        T = torch.full_like(u, nets.student.times[0])
        t = T * (1 + u * (self.N - 1)) / self.N
        return t, (t - T / self.N).clamp(min=0), T

    def signal(self, s: Tensor, T: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """y(z, s), z [B, ...]."""
        z = draw.normal("z", (len(s), *nets.shape))
        student = nets.student
        return student.denoiser(student.input_scale * z, T, with_end_key(batch.get("c"), s / T)).x0, z

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        _, s, T = self.times(nets, draw)
        return self.signal(s, T, nets, batch, draw)[0]

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        t, s, T = self.times(nets, draw)
        c = batch.get("c")
        path = nets.teacher.path
        teacher = CFG(nets.teacher, self.guidance)
        solver = STEPS[self.solver] if isinstance(self.solver, str) else self.solver
        with torch.no_grad():
            y, z = self.signal(t, T, nets, batch, draw)
            alpha, sigma = path.coefficients(s)
            x_s = solver(teacher, path.diffuse(y, z, t), t, s, c)
            target = (x_s - expand(sigma, z) * z) / expand(alpha, z)
            w = expand(1 - path.ratio(s) / path.ratio(t), z)
        delta = (x - target) / w
        loss = reduce(delta**2, self.reduction)
        logs = {"delta": (delta * w).detach().square().mean()}
        if self.boundary:
            y, z = self.signal(T, T, nets, batch, draw)
            with torch.no_grad():
                start = teacher(path.diffuse(torch.zeros_like(z), z, T), T, c).x0
            logs["boundary"] = reduce((y - start) ** 2, self.reduction)
            loss = loss + self.boundary * logs["boundary"]
        return loss, logs
