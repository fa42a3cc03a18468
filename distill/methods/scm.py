"""sCM: continuous-time consistency distillation on TrigFlow. Lu & Song 2024, arXiv 2410.11081.

    x_t = cos(t) x + sin(t) sigma_d eps of a real image x,   t = arctan( exp(tau) / sigma_d ),  tau normal
    f(x_t, t) = cos(t) x_t - sin(t) sigma_d F(x_t, t)        the student's x0;  sigma_d F is its dx/dt
    g   = -cos^2(t) ( sigma_d F - dx_t/dt ) - r cos(t) sin(t) ( x_t + sigma_d dF/dt )    = cos(t) df/dt at r = 1
    L   = v e^-l m + l,   m = | F - sg( F + g / (|g| + c) ) |^2       r warms up from 0 to 1
    v   = 1 / ( sigma_d tan(t) ) or 1,   l(t) learned or 0: at its optimum it is log( v E m ), and v makes no difference

dx_t/dt is the guided teacher's. dF/dt is the derivative along it: a forward-mode pass of (x_t, t) with tangents
cos(t) sin(t) (dx_t/dt, 1), without gradient. The same pass gives the F of the loss. The angle t is pi / 2 times the
time of the schedule.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.guidance import CFG, scale_of, with_guidance_key
from distill.diffusion.schedule import Prediction, Trig, expand
from distill.diffusion.times import LogNormal, TimeDistribution
from distill.losses import Reduction, jvp, per_sample
from distill.method import Batch, ConsistencyMethod, Logs, Nets, Requirement, guidance_requirements
from distill.networks.adaptive_weight import weigh
from distill.random import Draw
from distill.ranges import Finite, Natural, Positive, Weight


@dataclass(frozen=True)
class SCM(ConsistencyMethod):
    """Continuous-time consistency distillation: needs images (or samples of the teacher)."""

    guidance: Finite | tuple[Finite, Finite] = 1.0  # guidance scale; a range (SANA-Sprint: 4, 5) is embedded
    sigma_d: Positive = 0.5  # standard deviation of the data (EDM, sCM); 1 for latents (rCM)
    times: TimeDistribution = LogNormal(-1.0, 1.4)  # law of tau: (-1, 1.4) CIFAR-10, (-1, 1.6) ImageNet-64 (paper)
    warmup: Natural = 10_000  # steps until r = 1 (paper)
    normalise: bool = True  # normalise the tangent g
    c: Weight = 0.1  # floor c of the norm (paper)
    norm: Literal["rms", "vector"] = "rms"  # |g| per element (then c does not depend on the size), or of the vector
    reduction: Reduction = "mean"  # m over the elements; their sum is close to 1, so with it l = log v is the optimum
    adaptive: bool = False  # learn l (paper, code); normalised tangents have one size, so it changes little
    prior: bool = False  # v = 1 / (sigma_d tan(t)) (paper, code); False: v = 1
    one_pass: bool = True  # F of the loss comes from the pass of dF/dt; False: a second pass, as with recomputed blocks

    @property
    def roles(self) -> tuple[str, ...]:
        return ("weight",) if self.adaptive else ()

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return (Requirement.REAL, *guidance_requirements(self.guidance))

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        path = Trig(self.sigma_d)
        c = batch.get("real_c")
        teacher = nets.teacher.on_schedule(path)
        student = nets.student.denoiser.on_schedule(path)
        t = path.time(nets.teacher.schedule.ratio(self.times(draw, "t", len(x), nets.teacher.schedule)))
        w = scale_of(self.guidance, draw, len(x))
        x_t = path.diffuse(x, draw.normal("eps", x.shape).to(x), t)
        cos, sin = (expand(f(path.native(t)), x) for f in (torch.cos, torch.sin))
        F = lambda x_t, t: self.velocity(student(x_t, t, with_guidance_key(c, w)), t) / self.sigma_d
        with torch.no_grad():
            dx = self.velocity(CFG(teacher, w)(x_t, t, c), t)
            along = (cos * sin * dx, (cos * sin).reshape(t.shape).to(t) * (2 / math.pi))
        once = self.one_pass and student.dual
        out, dF = jvp(F, (x_t, t), along, once)
        with torch.no_grad():
            sgF = out.detach()
            r = min(1.0, draw.step / self.warmup) if self.warmup else 1.0
            g = self.tangent(self.sigma_d * sgF - dx, cos * sin * x_t, self.sigma_d * dF, cos, sin, r)
            size = per_sample(g**2).sqrt() * (1.0 if self.norm == "rms" else x[0].numel() ** 0.5)
            tangent = g / (size + self.c) if self.normalise else g
        loss = ((out if once else F(x_t, t)) - sgF - tangent) ** 2
        loss, logs = weigh(loss, path.ratio(t), self.prior, nets.weight if self.adaptive else None, self.reduction)
        return loss, {"tangent": size.mean()} | logs

    def tangent(self, lag: Tensor, x: Tensor, slope: Tensor, cos: Tensor, sin: Tensor, r: float) -> Tensor:
        return -(cos**2) * lag - r * (x + slope)

    def velocity(self, pred: Prediction, t: Tensor) -> Tensor:
        """dx/dt = cos(t) sigma_d eps - sin(t) x0, without a division of x0 by sin(t)."""
        theta = Trig(self.sigma_d).native(t)
        return expand(theta.cos() * self.sigma_d, pred.x) * pred.eps - expand(theta.sin(), pred.x) * pred.x0
