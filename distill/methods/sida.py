"""SiDA: adversarial score identity distillation. Zhou et al. 2024, arXiv 2410.14919; few-step, DiT: 2509.25127.

    x_t = alpha_t x + sigma_t eps,   y_t = alpha_t y + sigma_t eps          real images y at the same t and eps
    l(x_t)    = mean over channels of the fake score's bottleneck at x_t, a map; of tokens [B, N, C] over N: no weights
    L_student = m ( L_SiD + lambda_g n w f( softplus(-l(x_t)) ) )      n elements of x, w of SiD; L_SiD before gan_start
    L_fake    = L_fake of SiD + lambda_d v ( f(softplus(l(x_t))) + f(softplus(-l(y_t))) ) / 2
    batch fusion: f is the mean over the micro-batch, v = sigma_d^-2 + (alpha_t / sigma_t)^2, EDM's weight
    per sample:   f is each sample's own mean, v = n

l(x_t) comes from the passes that SiD makes anyway, under c itself if the score is guided. For y only the encoder runs.
Gradients flow as in SiD, and from l through the encoder to x; the encoder learns both tasks. SiD2A is SiDA with a
student that starts from SiD's (--student.init). Diffusion-GAN of the few-step models: fusion "sample".
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import expand
from distill.losses import denoising, reduce
from distill.method import Batch, Logs, Nets, Requirement, Taps, Update
from distill.methods.sid import SiD
from distill.networks.discriminator import accuracy
from distill.random import Draw
from distill.ranges import Finite, Natural, Positive, Weight


@dataclass(frozen=True)
class SiDA(SiD):
    """Score identity distillation with a GAN on real images and their conditions, without new parameters."""

    alpha: Finite = 1.0  # alpha: scripts (SiD2A: 1.0 or 1.2)
    gan: Weight = 0.01  # lambda_g, weight of the student's GAN loss (scripts; SiD-DiT 1)
    gan_fake: Weight = 1.0  # lambda_d, weight of the fake score's GAN loss (scripts; on EDM2's networks 100)
    mix: Positive = 0.5  # m, factor of both losses together (code)
    fusion: Literal["batch", "sample"] = "batch"  # type of f and v; SiD-DiT: sample
    clamp: Positive = 10.0  # limit of |l| in the student's loss; with fusion "sample" also in the fake score's (code)
    taps: Taps = None  # None: the bottleneck; of transformers the last norm, norm_out (SiD-DiT)
    pairs: bool = True  # samples of the fake score's step have real images' conditions (SiDA code; SiD-DiT: their own)
    start: Natural = 0  # first step of the student (code: after 100k images; SiD-DiT 20k)
    gan_start: Natural = 0  # first step of its GAN loss (code: after 200k images; SiD-DiT 40k)

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return super().requirements + Requirement.select(REAL=self.gan or self.gan_fake)

    def updates(self) -> list[Update]:
        student = Update("student", self.student_loss, self.fake_steps, start=self.start)
        return [Update("fake", self.fake_loss), student]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        paired = self.pairs and self.gan_fake and draw.player == "fake" and "real_c" in batch
        if paired:
            batch["c"] = batch["real_c"]
        x = super().sample(nets, batch, draw)
        if paired:
            batch["real_c"] = batch["c"]  # some of them are null conditions
        return x

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        if not self.gan or draw.step < self.gan_start:
            return super().student_loss(x, nets, batch, draw)
        loss, logs, w, features = self.identity(x, nets, batch, draw, self.taps)
        f = self.fused(F.softplus(-self.logits(features, x, self.clamp)), x)
        gan = reduce((w * f).expand_as(x), self.reduction)
        return self.mix * (loss + self.gan * gan), logs | {"gan": f.mean()}

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        if not self.gan_fake:
            return super().fake_loss(x, nets, batch, draw)
        c = batch.get("c")
        fake = nets.fake_score
        x_t, t, eps = self.fake_times.diffuse(x, fake.path, draw)
        pred, of_x = CFG(fake, self.kappa[0]).predict_with_features(x_t, t, c, self.taps)
        of_y = fake.features(fake.path.diffuse(batch["real"].to(x), eps, t), t, batch.get("real_c", c), self.taps)
        low, high = (self.logits(h, x, self.clamp if self.fusion == "sample" else float("inf")) for h in (of_x, of_y))
        f = (self.fused(F.softplus(low), x) + self.fused(F.softplus(-high), x)) / 2
        v = expand(fake.sigma_d**-2 + fake.path.ratio(t) ** -2, x) if self.fusion == "batch" else 1.0
        gan = reduce(v * f if self.fusion == "batch" else f.expand_as(x), self.reduction)
        logs = {"gan": f.mean(), "gan_right": accuracy(low, high), "logit_gap": (high.mean() - low.mean()).detach()}
        return denoising(pred, x, eps, self.reduction) + self.gan_fake * gan, logs

    def logits(self, features: list[Tensor], x: Tensor, limit: float) -> Tensor:
        return features[0].to(x).mean(1).clamp(-limit, limit)

    def fused(self, elements: Tensor, x: Tensor) -> Tensor:  # a scalar, or [B, 1, ...]
        return elements.mean() if self.fusion == "batch" else expand(elements.reshape(len(x), -1).mean(1), x)
