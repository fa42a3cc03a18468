"""SANA-Sprint: sCM with LADD, one to four steps of one model. Chen et al. 2025, arXiv 2503.09641.

    L_student = L_sCM(y) + lambda L_LADD(x),  y real,  sCM's guidance w told to the student wherever it is called
    x         = D_student(y_s, s, c, w),      y_s = alpha_s y + sigma_s z, s of sCM's law; or, with probability p,
                                              the first call of a generation: noise alone at the student's first time
    L_heads   = L_heads of LADD on x and y    hinge, in features of the frozen teacher at u, eps of their own

The teacher is a flow network with input t in [0, 1] and normalised queries and keys (python -m pipelines.sana). It is
read exactly on TrigFlow (on_schedule). The authors first multiply latents by sigma_d = 1/2. Here sigma_d = 1, and
tau + ln 2 and c / sigma_d have the same meaning for unscaled latents. Their weight v e^-l is left out (`prior`,
`adaptive`): at its optimum it is 1 / m, m the mean square, which is 1 / n for n elements per sample, because tangents
have length 1. That is a sum. Their heads' loss is half of ours. Gradients flow as in sCM and in LADD.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.guidance import scale_of, with_guidance_key
from distill.diffusion.schedule import expand
from distill.diffusion.times import LogNormal, TimeDistribution
from distill.losses import Reduction
from distill.method import Batch, FeatureTaps, Logs, Nets, Taps, Update
from distill.methods.ladd import LADD
from distill.methods.scm import SCM
from distill.random import Draw
from distill.ranges import Finite, Natural, Positive, UnitInterval, Weight


@dataclass(frozen=True)
class Sprint(SCM):
    """Continuous-time consistency with a GAN in the teacher's features: needs images with their conditions."""

    guidance: Finite | tuple[Finite, Finite] = (4.0, 5.0)  # guidance scale, embedded (paper: one of 4, 4.5, 5)
    sigma_d: Positive = 1.0  # standard deviation of unscaled latents
    times: TimeDistribution = LogNormal(0.2 + math.log(2), 1.6)  # P_G (code; paper: 0 + ln 2) of sCM and of s
    warmup: Natural = 2000  # student steps until r = 1 (code: 4000 turns, every other one is the heads')
    c: Weight = 0.2  # floor of the norm: 0.1 for halved latents
    norm: Literal["rms", "vector"] = "vector"  # norm of g (code)
    reduction: Reduction = "sum"
    gan: Weight = 0.5  # lambda, weight of L_LADD (paper)
    gan_times: TimeDistribution = LogNormal(-0.6 + math.log(2), 1.0)  # distribution P_D (paper) of u
    taps: Taps = None  # modules whose features heads read; SANA: blocks 2, 8, 14 and 19 (code)
    places: bool = True  # every token has its own logit (code)
    last: UnitInterval = 0.5  # p, probability of the student's first time: max-time weighting (paper)

    @property
    def roles(self) -> tuple[str, ...]:
        return (*super().roles, "disc") if self.gan else super().roles

    @property
    def ladd(self) -> LADD:
        return LADD(self.taps, gan_times=self.gan_times, places=self.places)

    @property
    def feature_taps(self) -> dict[str, FeatureTaps]:
        return {"disc": FeatureTaps(self.taps, self.places)}

    def updates(self) -> list[Update]:
        heads = [Update("fake", self.fake_loss, reuse=True)] if self.gan else []
        return [*super().updates(), *heads]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        if not self.gan:
            return super().sample(nets, batch, draw)
        student = nets.student
        y = batch["real"]
        B = len(batch["real"])
        batch["c"] = batch.get("real_c")
        w = scale_of(self.guidance, draw, B)
        path = student.denoiser.path
        z = draw.normal("z", y.shape).to(y)
        s = self.times(draw, "s", B, path)
        last = draw.uniform("last", (B,)) < self.last
        s = torch.where(last, student.times[0], s)
        y_s = torch.where(expand(last, y).bool(), student.input_scale * z, path.diffuse(y, z, s))
        return student.denoiser(y_s, s, with_guidance_key(batch["c"], w)).x0

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        if not self.gan:
            return super().student_loss(x, nets, batch, draw)
        loss, logs = super().student_loss(batch["real"].to(x), nets, batch, draw)
        gan, _ = self.ladd.student_loss(x, nets, batch, draw)
        return loss + self.gan * gan, logs | {"gan": gan}

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return self.ladd.fake_loss(x, nets, batch, draw)
