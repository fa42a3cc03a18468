"""RCGM: recursive consistent velocities, the any-step base of TwinFlow. Cheng et al. 2025, arXiv 2512.05150.

    x_t = (1 - t) x + t eps,   F(x_t, t, r) the average velocity from t down to r (distill/diffusion/end_time.py)
    v   = eps - x, or the guided teacher's;   v <- v + kappa ( F'(x_t, t, t | c) - F'(x_t, t, t | null) )
    I   = the integral of F' from x_t - d v at t - d down to r by N jumps    d = .01
    g   = clamp( ((t - r) F - I) / d - v, +-1 )       0 where (t - r) F is the integral of v;  t - r <= d: F - v
    L   = w e / sg(e + c^2)^.5,   e = mean |F - sg(F - g)|^2 of a sample,   w = 1 + tan( (1 - (t - r)) pi / 2.5 )

F' is the student's average. A third each: (t, r) = (1, 0); r in [.95 t, t]; r in [0, t]. Gradients flow only through F.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.end_time import PATH, average, guide_velocity, integral
from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import expand
from distill.diffusion.times import TimeDistribution, Uniform
from distill.losses import adaptive
from distill.method import Batch, ImageMethod, Logs, Nets, Requirement
from distill.random import Draw
from distill.ranges import Calls, Decay, Finite, Positive, UnitInterval


@dataclass(frozen=True)
class RCGM(ImageMethod):
    """Average velocities by bootstrapping: needs images (or samples of the teacher)."""

    velocity: Literal["data", "teacher"] = "data"  # velocity v: eps - x, or the teacher's
    guidance: Finite = 1.0  # guidance scale of the teacher's v
    kappa: Finite = 0.0  # guidance of F by itself, 1 / (1 - kappa) (code: .8)
    interval: tuple[UnitInterval, UnitInterval] = (0.0, 1.0)  # open interval of t where kappa acts; not at t = 1 (code)
    target_ema: Decay = 0.99  # decay of the average F' (code: .999 OpenUni, .99 SD3.5 and LoRA); 0: F' is the student
    times: TimeDistribution = Uniform(0.0, 1.0)  # distribution of t: Beta(1, 1) (code)
    step: Positive = 0.01  # step d (code); as d -> 0, g is MeanFlow's
    N: Calls = 2  # number of jumps of I (code)
    clamp: Positive = 1.0  # limit of g (code)
    c: Positive | None = 1e-3  # constant of Barron's loss (code); None: L = e
    jumps = True

    @property
    def roles(self) -> tuple[str, ...]:
        return ("target",) if self.target_ema else ()

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return Requirement.select(REAL=True, END_TIME=True, NULL_CONDITION=(self.guidance, self.kappa) != (1, 0))

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        net = nets.student.denoiser.on_schedule(PATH)
        c = batch.get("real_c")
        eps = draw.normal("eps", x.shape).to(x)
        t = self.times(draw, "t", len(x), PATH)
        share = draw.uniform("r", (len(x),)).double()
        whole = draw.samples % 3 == 0
        short = draw.samples % 3 == 1
        r = torch.where(whole, 0.0, t * torch.where(short, 1 - 0.05 * share, share))
        t = torch.where(whole, 1.0, t)
        x_t = PATH.diffuse(x, eps, t)
        w = 1 + torch.tan((1 - (t - r)) * math.pi / 2.5)
        F = average(net, x_t, t, r, c)
        with torch.no_grad():
            target = (nets.target or nets.student.denoiser).on_schedule(PATH)
            teacher = CFG(nets.teacher.on_schedule(PATH), self.guidance)
            v = eps - x if self.velocity == "data" else average(teacher, x_t, t, None, c)
            v = guide_velocity(v, 1.0, self.kappa, target, x_t, t, c, (t > self.interval[0]) & (t < self.interval[1]))
            g = self.residual(F, x_t, t, r, v, target, c)
        return (w.to(F) * self.distance(F, g.clamp(-self.clamp, self.clamp))).mean(), {"delta": g.square().mean()}

    def residual(self, F: Tensor, x: Tensor, t: Tensor, r: Tensor, v: Tensor, net: Denoiser, c: Condition) -> Tensor:
        near = t - r <= self.step
        I = integral(net, x - self.step * v, t - self.step, r, c, self.N)
        return torch.where(expand(near, x).bool(), F - v, (expand(t - r, x) * F - I) / self.step - v)

    def distance(self, x: Tensor, g: Tensor) -> Tensor:  # d(x, sg(x - g)) [B]
        e = (x - x.detach() + g.detach()).square().flatten(1).mean(1)
        return e if self.c is None else adaptive(e, 0.5, self.c**2)

    def after_student_step(self, nets: Nets) -> None:
        nets.update_target(self.target_ema)
