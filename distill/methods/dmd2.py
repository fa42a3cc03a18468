"""DMD2: improved distribution matching distillation. Yin et al. 2024, arXiv 2405.14867.

    x   = G(z, c) after k calls, one k a step; the first k - 1 calls (backward simulation) without gradient
    x_t = alpha_t x + sigma_t eps,   real = D_real^w(x_t),   fake = D_fake(x_t)
    g         = (fake - real) / mean| x - real |                            per sample, without gradient
    L_student = x . g + lambda_g softplus(-l(x))
    L_fake    = | D_fake(x_t) - x |^2 + lambda_d ( softplus(l(x)) + softplus(-l(real image)) )
    l(x)      = heads(features of the fake score at alpha_u x + sigma_u eps', u)       diffusion GAN, own u and eps'

The student is updated first, every `every` steps; fake and heads at each, on the same x. Gradients: through l, not g.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.guidance import CFG, merge
from distill.diffusion.times import Count, Finite, Grid, TimeDistribution, Weight
from distill.losses import Reduction, denoising, gan_generator, gradient_surrogate, normaliser, reduce, score_gap_logs
from distill.method import Batch, Logs, Nets, Requirement, Update
from distill.methods.diffusion_gan import DiffusionGAN, discriminator_loss
from distill.random import Draw


@dataclass(frozen=True)
class DMD2(DiffusionGAN):
    """Distribution matching with a GAN on real images; with both GAN weights 0 it needs only prompts."""

    guidance: Finite = 1.0  # classifier-free guidance scale of the teacher; the authors: 8 on SDXL, 1.75 on SD 1.5
    every: Count = 5  # updates of the fake score per update of the student; the authors: 5, on SD 1.5 10
    gan: Weight = 5e-3  # weight of the GAN in the student's loss; 0 and gan_fake 0: no images are needed
    gan_fake: Weight = 1e-2  # weight of the GAN in the loss of fake score and discriminator
    times: TimeDistribution = Grid(1000, 20, 980)  # distribution of t in the student's loss (code)
    fake_times: TimeDistribution = Grid(1000, 0, 999)  # distribution of t in the fake score's loss (code)
    fake_space: Literal["network", "x0"] = "network"  # the fake score's error is of the network's output or of x0
    reduction: Reduction = "mean"  # mean or sum over the elements of a sample
    normalise: bool = True  # divide the student's gradient by the mean distance to the teacher's prediction
    walk: bool = False  # fake score: go on with one generation, one call per iteration, instead of a new one: less work

    @property
    def roles(self) -> tuple[str, ...]:
        return ("fake", "disc") if self.gan or self.gan_fake else ("fake",)

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return Requirement.select(NULL_CONDITION=self.guidance != 1, REAL="disc" in self.roles)

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss, self.every), Update("fake", self.fake_loss, 1, True, self.walk)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        k = draw.index("steps", len(nets.student.times)) if draw.late is None else draw.late
        return nets.generate(batch, draw, 1 + k)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        c = batch.get("c")
        x_t, t, _ = self.times.diffuse(x, nets.teacher.path, draw)
        with torch.no_grad():
            real, fake, h, logs = self.predict(x_t, t, c, nets)
            g = h * (fake - real) / (normaliser(x, real) if self.normalise else 1.0)
        loss = reduce(gradient_surrogate(x, g), self.reduction)
        if self.gan:
            logits = self.logits(x, c, nets, draw, "gan", at=(x_t, t) if self.at_score_noise else None)
            logs["gan"] = gan_generator(logits)
            loss = loss + self.gan * logs["gan"]
        return loss, score_gap_logs(x, real, fake) | logs

    def predict(self, x_t: Tensor, t: Tensor, c, nets: Nets) -> tuple[Tensor, Tensor, Tensor | float, Logs]:
        real = CFG(nets.teacher, self.guidance)(x_t, t, c).x0
        return real, nets.fake_score(x_t, t, c).x0, 1.0, {}  # both x0, weight of g per sample (f-distill: not 1)

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        c = batch.get("c")
        x_t, t, eps = self.fake_times.diffuse(x, nets.fake_score.path, draw)
        pred, features = nets.fake_score.predict_with_features(x_t, t, c, self.shared_taps)
        loss = denoising(pred, x, eps, self.reduction, self.fake_space)
        logs: Logs = {}
        if self.gan_fake:
            y = batch["real"].to(x)
            y_c = batch.get("real_c")
            if self.share or self.at_score_noise:
                fake = nets.discriminator(*features) if features else self.logits(x, c, nets, draw, at=(x_t, t))
                real = replace(self, gan_times=self.fake_times).logits(y, y_c, nets, draw, "gan_real")
            else:
                fake, real = self.logits(torch.cat([x, y]), merge(c, y_c), nets, draw, "gan_fake", "gan_real").chunk(2)
            logs["gan"], logs["gan_right"] = discriminator_loss(fake, real)
            loss = loss + self.gan_fake * logs["gan"]
        return loss, logs
