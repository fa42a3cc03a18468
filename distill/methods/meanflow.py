"""MeanFlow: mean flows for one-step generative modeling. Geng et al. 2025, arXiv 2505.13447.

    x_t = (1 - t) x + t eps,   F(x_t, t, r) the average velocity from t down to r (distill/diffusion/end_time.py)
    v   = eps - x   or the guided teacher's velocity at x_t (distillation);   with guidance in F itself:
          v <- omega v + (1 - omega - kappa) F(x_t, t, t | null) + kappa F(x_t, t, t)
    g   = F - v + (t - r) dF/dt,    dF/dt = v . dF/dx + dF/dt    the identity (t - r) F = integral of v, differentiated
    L   = |F - sg(F - g)|^2 / sg(|g|^2 + floor)^p                sums over the elements of a sample, mean over the batch
    or    |F - sg(F - g / (|g| + floor)^p)|^2                    norm "vector"; "rms": of g / sqrt(its elements)

dF/dt is a forward-mode pass of (x_t, t) with tangents (v, 1) and fixed r, without gradient. The same pass gives the F
of the loss, the only path of gradients. With r = t it is flow matching. A student of several calls without new noise
(student.renoise "ddim") goes from each to the time of the next (paper); with new noise each goes to 0.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.end_time import PATH, average, guide_velocity
from distill.diffusion.guidance import CFG, drop
from distill.diffusion.schedule import expand
from distill.diffusion.times import LogitNormal, TimeDistribution
from distill.losses import adaptive, jvp
from distill.method import Batch, ImageMethod, Logs, Nets, Requirement
from distill.random import Draw
from distill.ranges import Finite, Natural, UnitInterval, Weight


@dataclass(frozen=True)
class MeanFlow(ImageMethod):
    """Average velocities of data, or of a teacher: needs images (or samples of the teacher)."""

    velocity: Literal["data", "teacher"] = "data"  # velocity v: eps - x (paper), or the teacher's (FastGen)
    guidance: Finite = 1.0  # guidance scale of the teacher (FastGen, Wan: 3)
    omega: Finite = 1.0  # omega; F has guidance scale omega / (1 - kappa) (FastGen, XL/2: .2 and .92)
    kappa: Finite = 0.0
    interval: tuple[UnitInterval, UnitInterval] = (0.0, 1.0)  # t where these three scales act (FastGen, XL/2: 0, .75)
    p_drop: UnitInterval = 0.1  # probability of a null condition if F has guidance (paper)
    times: TimeDistribution = LogitNormal(-0.4, 1.0)  # distribution of t and r; the larger is t (paper, ImageNet-256)
    end_times: TimeDistribution | None = None  # distribution of r (FastGen, CIFAR-10: logit-normal, -4, 1.6)
    equal: UnitInterval = 0.75  # fraction of samples with r = t (paper; CIFAR-10 .25)
    p: Weight = 1.0  # exponent of the adaptive weight (paper; CIFAR-10 .75); 0: squared error
    floor: Weight = 0.01  # floor of the adaptive weight (code)
    norm: Literal["square", "vector", "rms"] = "square"  # rms: per element, with p = 1 and floor 10 (FastGen, Wan)
    warmup: Natural = 0  # steps until dF/dt has its full weight (FastGen's distillation 2000)
    one_pass: bool = True  # F of the loss comes from the pass of dF/dt; False: a second pass, as with recomputed blocks

    jumps = True

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        guided = (self.guidance, self.omega, self.kappa) != (1, 1, 0)
        return Requirement.select(REAL=True, END_TIME=True, NULL_CONDITION=guided)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        net = nets.student.denoiser.on_schedule(PATH)
        c = batch.get("real_c")
        eps = draw.normal("eps", x.shape).to(x)
        a = self.times(draw, "t", len(x), PATH)
        b = (self.end_times or self.times)(draw, "r", len(x), PATH)
        t = torch.maximum(a, b)
        r = torch.minimum(a, b)
        r = torch.where(draw.uniform("equal", (len(x),)) < self.equal, t, r)
        dropped = draw.uniform("drop", (len(x),)) < self.p_drop
        if (self.omega, self.kappa) != (1, 0):
            c = drop(c, net.null, dropped)
        x_t = PATH.diffuse(x, eps, t)
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        with torch.no_grad():
            w = self.guidance if self.interval == (0, 1) else 1 + (self.guidance - 1) * inside.double()
            teacher = CFG(nets.teacher.on_schedule(PATH), w)
            v = eps - x if self.velocity == "data" else average(teacher, x_t, t, None, c)
            v = guide_velocity(v, self.omega, self.kappa, net, x_t, t, c, inside & ~dropped)
        once = self.one_pass and net.dual
        F, dF = jvp(lambda x_t, t: average(net, x_t, t, r, c), (x_t, t), (v, torch.ones_like(t)), once)
        warm = min(1.0, draw.step / self.warmup) if self.warmup else 1.0
        g = F.detach() - v + warm * expand(t - r, x) * dF
        return self.distance(F if once else average(net, x_t, t, r, c), g).mean(), {"delta": g.square().mean()}

    def distance(self, F: Tensor, g: Tensor) -> Tensor:  # [B]
        if self.norm != "square":
            g = g / g[0].numel() ** 0.5 if self.norm == "rms" else g
            g = g / expand((torch.linalg.vector_norm(g.flatten(1), dim=1) + self.floor) ** self.p, g)
        size = (F - F.detach() + g).square().flatten(1).sum(1)
        return adaptive(size, self.p, self.floor) if self.norm == "square" else size
