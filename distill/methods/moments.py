"""Moment matching: multistep distillation of diffusion models. Salimans et al. 2024, arXiv 2406.04103, algorithm 2.

    s = t_1 u,  u of a law;   t = min(s + d, t_1),  d uniform below the largest gap of the student's times, t_1 first
    x_t = alpha_t y + sigma_t eps             of a real image y
    x   = G(x_t, c)                           one call of the student, at t
    x_s = alpha_s x + sigma_s (rho (x_t - alpha_t x) / sigma_t + sqrt(1 - rho^2) n)      the student's transition
    L_fake    = |x - D_fake(x_s)|^2 + lambda |D_real^w(x_s) - D_fake(x_s)|^2             x without gradient
    L_student = x . g,    g = D_fake(x_s) - D_real^w(x_s)                                g without gradient

With "ancestral" noise rho = (sigma_s / alpha_s) / (sigma_t / alpha_t): x_s is of q(x_s | x_t, x) (paper). With "fresh"
noise rho = 0. An optimal fake is (E[x | x_s] + lambda D_real) / (1 + lambda), so g is 1 / (1 + lambda) of the gap of
both conditional expectations: lambda changes the length of the push and not where it ends. If the gap is 0 at every s,
each call leads from the law of x_t to that of x_s. Gradients flow through x alone, into one call.

The paper weights both losses by w(s); here it is 1, in x0. Its form without a fake (algorithm 3) needs the averages of
Adam from the teacher's training, which a finished teacher does not have.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.guidance import CFG
from distill.diffusion.times import TimeDistribution, Uniform
from distill.diffusion.transition import Renoise
from distill.losses import Reduction, gradient_surrogate, reduce, score_gap_logs
from distill.method import Batch, Logs, Method, Nets, Requirement, Update
from distill.random import Draw
from distill.ranges import Finite, Weight


@dataclass(frozen=True)
class MomentMatching(Method):
    """Students of several calls that match the teacher's conditional expectation after each call: needs images."""

    guidance: Finite = 1.0  # guidance scale w of the teacher, in both losses (paper: a choice; 1 is none)
    anchor: Weight = 1.0  # lambda, weight of the fake's distance to the teacher (paper: 1)
    times: TimeDistribution = Uniform(0.0, 1.0)  # p(s), of s / t_1 (paper, as reimplementations quote it)
    reduction: Reduction = "mean"  # reduction of both losses (ours)

    roles = ("fake",)

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return Requirement.select(REAL=True, NULL_CONDITION=self.guidance != 1)

    @property
    def noises(self) -> tuple[Renoise, ...]:
        return ("ancestral", "fresh")

    def on_build(self, nets: Nets) -> None:
        if not nets.student.transition.adds_noise:
            raise ValueError(
                f"student.renoise is {nets.student.renoise!r}; MomentMatching needs new noise, even for one call: pass "
                "--student.renoise ancestral (paper) or fresh"
            )

    def updates(self) -> list[Update]:
        return [Update("fake", self.fake_loss), Update("student", self.student_loss)]

    def diffuse_images(self, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:  # x_t, t, s
        y = batch["real"]
        path = nets.student.denoiser.path
        calls = nets.student.times
        gap = max(t - s for t, s in zip(calls, (*calls[1:], 0.0), strict=True))
        s = calls[0] * self.times(draw, "s", len(y), path)
        t = (s + gap * draw.uniform("gap", (len(y),))).clamp(max=calls[0])
        return path.diffuse(y, draw.normal("eps", y.shape).to(y), t), t, s

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        x_t, t, _ = self.diffuse_images(nets, batch, draw)
        return nets.student.denoiser(x_t, t, batch.get("real_c")).x0

    def predict(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:  # D_real^w, D_fake
        x_t, t, s = self.diffuse_images(nets, batch, draw)
        at = (nets.student.renoise_from(x_t, x, t, s, draw.normal("n", x.shape).to(x)), s, batch.get("real_c"))
        with torch.no_grad():
            real = CFG(nets.teacher, self.guidance)(*at).x0
        return real, nets.fake_score(*at).x0

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        real, fake = self.predict(x, nets, batch, draw)
        return reduce((x - fake) ** 2 + self.anchor * (real - fake) ** 2, self.reduction), {}

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        with torch.no_grad():
            real, fake = self.predict(x, nets, batch, draw)
        loss = reduce(gradient_surrogate(x, fake - real), self.reduction)
        return loss, score_gap_logs(x, real, fake, own=False)
