"""rCM: score-regularized continuous-time consistency models. Zheng et al. 2025, arXiv 2510.08431.

    L_student = L_sCM(y) + lambda L_DMD(x),  y real (or of the teacher),  x = G(z, c) after 1, 2, ... or N calls
    L_sCM     = | F - sg( F + g / (|g| + c) ) |^2            sCM, its tangent g along the guided teacher
    L_DMD     = 2 x . (fake - real) / mean| x - real |       DMD2 without a GAN; the teacher guided, the fake not
    L_fake    = | D_fake(x_t) - x |^2 / sin^2(t)             of a student whose samples are made anew
    g         = -cos(t) sqrt( 1 - r^2 sin^2(t) ) ( F - dx_t/dt ) - cos(t) sin(t) ( r x_t + dF/dt )      sigma_d = 1

sCM covers the modes and blurs, DMD sharpens and loses modes; lambda balances them. Both are sums over elements (lambda
= 0.01 is for sums). The 2 comes from the authors' | x - sg(x - g) |^2, which has no factor 1/2. Until `warmup` the
student has only sCM, at each step, and the fake score is not trained. In g, where sCM has r = 1, dF/dt has its full
weight from the start. The intermediate times of x are the student's own; the paper draws them. Gradients as in sCM and
DMD2.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distill.diffusion.schedule import Trig, expand
from distill.diffusion.times import LogNormal, ShiftedTimes, TimeDistribution, Uniform
from distill.losses import Reduction, reduce
from distill.method import Batch, Logs, Nets, Update
from distill.methods.dmd2 import DMD2
from distill.methods.scm import SCM
from distill.random import Draw
from distill.ranges import Count, Finite, Natural, Positive, Weight


@dataclass(frozen=True)
class RCM(SCM):
    """Continuous-time consistency with distribution matching: needs images (or samples of the teacher)."""

    guidance: Finite = 5.0  # guidance scale of the teacher, in both losses (code)
    sigma_d: Positive = 1.0  # standard deviation of the data (paper)
    times: TimeDistribution = LogNormal(0.7, 1.6)  # distribution p_G: (0.7, 1.6) 1.3B, (1.5, 1.6) 14B (paper)
    warmup: Natural = 1000  # steps until r = 1 and until DMD begins: 1000 1.3B, 0 14B (paper)
    norm: Literal["rms", "vector"] = "vector"  # norm of g (code)
    reduction: Reduction = "sum"  # sum over elements in both losses (code)
    dmd: Weight = 0.01  # lambda, weight of DMD (paper)
    dmd_times: TimeDistribution = ShiftedTimes(Uniform(0.0, 1.0), 5.0)  # p_D for flows, also for the fake score (code)
    every: Count = 4  # fake score steps per student step: 4, 14B 9 (code: one of 5 or 10 turns is the student's)

    @property
    def roles(self) -> tuple[str, ...]:
        return (*super().roles, "fake") if self.dmd else super().roles

    @property
    def matching(self) -> DMD2:
        return DMD2(self.guidance, self.every, 0, 0, times=self.dmd_times, reduction=self.reduction)

    def updates(self) -> list[Update]:
        if not self.dmd:
            return super().updates()
        student = Update("student", self.student_loss, self.every, alone=self.warmup)
        return [student, Update("fake", self.fake_loss, start=self.warmup)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        if not self.dmd or draw.step < self.warmup:
            return super().sample(nets, batch, draw)
        return self.matching.sample(nets, batch, draw)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        loss, logs = super().student_loss(batch["real"].to(x), nets, batch, draw)
        if self.dmd and draw.step >= self.warmup:
            dmd, found = self.matching.student_loss(x, nets, batch, draw)
            loss = loss + 2 * self.dmd * dmd
            logs = logs | found | {"dmd": dmd}
        return loss, logs

    def tangent(self, lag: Tensor, x: Tensor, slope: Tensor, cos: Tensor, sin: Tensor, r: float) -> Tensor:
        return -cos * (cos**2 + (1 - r**2) * sin**2).sqrt() * lag - r * x - slope

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        """The error of x0 over sin(t) is the error of the velocity, which needs no division."""
        path = Trig(self.sigma_d)
        schedule = nets.fake_score.schedule
        eps = draw.normal("eps", x.shape).to(x)
        t = path.time(schedule.ratio(self.dmd_times(draw, "t", len(x), schedule)))
        pred = nets.fake_score.on_schedule(path)(path.diffuse(x, eps, t), t, batch.get("c"))
        cos, sin = (expand(a, x) for a in path.coefficients(t))
        error = self.velocity(pred, t) - (cos * self.sigma_d * eps - sin / self.sigma_d * x)
        return reduce(error**2, self.reduction), {}
