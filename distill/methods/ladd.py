"""LADD: latent adversarial diffusion distillation (SD3-Turbo). Sauer et al. 2024, arXiv 2403.12015.

    x    = D_student(y_s, s, c),   y_s = alpha_s y + sigma_s z of a real sample y; at the student's first time z alone
    l(x) = heads(features of the frozen teacher at alpha_u x + sigma_u eps, u, c)      a head each tapped block
    L_student = -mean l(x)
    L_heads   = mean relu(1 + l(x)) + mean relu(1 - l(y))           hinge, over all heads and their places
    loss "softplus": mean softplus(-l(x)), and mean softplus(l(x)) + mean softplus(-l(y)) of the heads

There is no score matching and no fake score: the discriminator uses the teacher's features at noise level u. A low u
distinguishes details, a high u compositions. y: the guided teacher's own samples (paper), which python -m
pipelines.pairs stores, or images. The heads are those of discriminator.py; the paper's also get u and c as inputs.
student_loss and fake_loss take any x and can be a term of other methods. L_student's gradient flows through the frozen
teacher up to its last tap, L_heads' gradient only to the heads.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.guidance import merge
from distill.diffusion.schedule import expand
from distill.diffusion.times import LogitNormal, TimeDistribution
from distill.losses import gan_discriminator, gan_generator, hinge_discriminator, hinge_generator
from distill.method import Batch, FeatureTaps, Logs, Method, Nets, Requirement, Taps, Update
from distill.networks.discriminator import accuracy, noised_features
from distill.random import Draw
from distill.ranges import Count, Positive


@dataclass(frozen=True)
class LADD(Method):
    """A GAN in the features of the teacher: needs its samples, or images, with their conditions."""

    taps: Taps = None  # blocks of the teacher with a head each (paper: every attention block)
    shares: tuple[Positive, ...] = ()  # probabilities of the calls in training: .7 .1 .1 .1 of four (paper); (): equal
    gan_times: TimeDistribution = LogitNormal(1.0, 1.0)  # distribution of u (paper: pi(t; m = 1, s = 1) of a flow)
    places: bool = True  # every token or patch has its own logit; False: a head gives their mean
    every: Count = 1  # head steps per student step (FastGen: n counts both, so n - 1 here)
    loss: Literal["hinge", "softplus"] = "hinge"  # GAN loss; paper, SANA-Sprint: hinge; FastGen: softplus

    roles = ("disc",)
    requirements = (Requirement.REAL,)

    def __post_init__(self) -> None:
        if self.loss not in ("hinge", "softplus"):
            raise ValueError(f"loss is {self.loss!r}; it must be 'hinge' or 'softplus'")

    @property
    def feature_taps(self) -> dict[str, FeatureTaps]:
        return {"disc": FeatureTaps(self.taps, self.places)}

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss, self.every), Update("fake", self.fake_loss, reuse=True)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        student = nets.student
        y = batch["real"]
        if self.shares and len(self.shares) != len(student.times):
            raise ValueError(f"shares are {self.shares}, of {len(student.times)} calls: give one for each, or none")
        if "real_c" in batch:
            batch["c"] = batch["real_c"]
        ends = torch.tensor(self.shares or (1.0,) * len(student.times), dtype=torch.float64).cumsum(0)
        u = draw.uniform("call", (len(y),)).double() * ends[-1]
        call = torch.searchsorted(ends.to(u.device), u, right=True).clamp(max=len(ends) - 1)
        s = torch.tensor(student.times, dtype=torch.float64, device=u.device)[call]
        z = draw.normal("z", y.shape)
        y_s = student.denoiser.path.diffuse(y, z.to(y), s)
        start = expand(call == 0, y).bool()
        return student.denoiser(torch.where(start, student.input_scale * z.to(y), y_s), s, batch.get("c")).x0

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        features = noised_features(nets.teacher, self.taps, self.gan_times, x, batch.get("c"), draw, "gan")
        loss = hinge_generator if self.loss == "hinge" else gan_generator
        return loss(nets.discriminator(*features)), {}

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        both = torch.cat([x, batch["real"].to(x)])
        c = merge(batch.get("c"), batch.get("real_c"))
        with torch.no_grad():
            features = noised_features(nets.teacher, self.taps, self.gan_times, both, c, draw, "gan_fake", "gan_real")
        fake, real = nets.discriminator(*features).chunk(2)
        logs = {"gan_right": accuracy(fake, real), "logit_gap": (real.mean() - fake.mean()).detach()}
        loss = hinge_discriminator if self.loss == "hinge" else gan_discriminator
        return loss(fake, real), logs
