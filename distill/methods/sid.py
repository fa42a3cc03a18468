"""SiD: Score identity Distillation. Zhou et al. 2024, arXiv 2404.04057; guided (LSG) 2406.01561; few-step 2505.12674.

    x   = G(z, c),   x_t = alpha_t x + sigma_t eps
    L_fake    = | D_fake^{k1}(x_t) - x |^2                     in the fake network's own space, x without gradient
    L_student = w delta . ( (D_fake^{k3}(x_t) - x) + (1 - alpha) delta ),   delta = D_real^{k4}(x_t) - D_fake^{k2}(x_t)
    w         = 1 / mean| x - D_real^{k4}(x_t) |               per sample, without gradient
    D^k       = D(null) + k (D(c) - D(null))

With k2 = k3 this is w delta . ((D_real - x) - alpha delta). Gradients flow through x, the teacher and the fake score.
LSG: all k equal, above 1. Zero-CFG: k1 = k2 = k3 = 0, k4 = 1. Anti-CFG: k2 = k3 < 0. Several steps: the students of
1, 2, ..., N calls are matched as one uniform mixture.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distill.diffusion.guidance import CFG, drop
from distill.diffusion.schedule import expand
from distill.diffusion.times import Karras, LogNormal, TimeDistribution
from distill.losses import Reduction, denoising, normaliser, reduce, score_gap_logs
from distill.method import Batch, Logs, Method, Nets, Requirement, Taps, Update
from distill.random import Draw
from distill.ranges import Calls, Finite, Positive, UnitInterval


@dataclass(frozen=True)
class SiD(Method):
    """Score identity distillation: data-free."""

    alpha: Finite = 1.2  # alpha: paper, table 1 (AFHQv2 and all guided or few-step models: 1)
    kappa: tuple[Finite, Finite, Finite, Finite] = (1.0, 1.0, 1.0, 1.0)  # guidances k1..k4; LSG: all 1.5, 2, 3 or 4.5
    p_drop: UnitInterval = 0.1  # fraction of null conditions in the fake's step if k1, k2 or k3 is not 1 (LSG code)
    fake_steps: Calls = 1  # fake score steps per student step (SiD: 1; for video, Self-Forcing's code: 5)
    times: TimeDistribution = Karras(0.002, 24.40834)  # t in the student's loss: t_max = 800 of 1000 (SiD code)
    fake_times: TimeDistribution = LogNormal(-1.2, 1.2)  # t in the fake score's loss: EDM's training law (SiD code)
    gain: Positive = 100.0  # factor of the student's loss (SiD code; LSG: 1)
    reduction: Reduction = "sum"  # sum over elements, mean over the batch (SiD code)
    weight: Literal["mean", "alpha"] = "mean"  # w as above, or alpha_t (SiD-DiT code: 1 - sigma)
    normalise: bool = True  # divide by mean| x - D_real |; False: w = 1

    roles = ("fake",)

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return Requirement.select(NULL_CONDITION=set(self.kappa) != {1.0})

    def updates(self) -> list[Update]:
        return [Update("fake", self.fake_loss), Update("student", self.student_loss, self.fake_steps)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        if set(self.kappa[:3]) != {1.0} and draw.player == "fake":  # before generating, as in the LSG code
            batch["c"] = drop(
                batch["c"], nets.fake_score.null, draw.uniform("drop", (len(draw.samples),)) < self.p_drop
            )
        return nets.generate(batch, draw, 1 + draw.index("steps", len(nets.student.times)))

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        x_t, t, eps = self.fake_times.diffuse(x, nets.fake_score.path, draw)
        pred = CFG(nets.fake_score, self.kappa[0])(x_t, t, batch.get("c"))
        return denoising(pred, x, eps, self.reduction), {}

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return self.identity(x, nets, batch, draw)[:2]

    def identity(
        self, x: Tensor, nets: Nets, batch: Batch, draw: Draw, taps: Taps = ()
    ) -> tuple[Tensor, Logs, Tensor | float, list[Tensor]]:  # loss, logs, w and the fake score's features of its pass
        c = batch.get("c")
        path = nets.teacher.path
        _, k2, k3, k4 = self.kappa
        x_t, t, _ = self.times.diffuse(x, path, draw)
        real = CFG(nets.teacher, k4)(x_t, t, c).x0
        pred, features = CFG(nets.fake_score, k2).predict_with_features(x_t, t, c, taps)
        fake = pred.x0
        fake3 = fake if k3 == k2 else CFG(nets.fake_score, k3)(x_t, t, c).x0
        w: Tensor | float = 1.0
        if self.normalise:
            w = 1 / normaliser(x, real) if self.weight == "mean" else expand(path.coefficients(t)[0], x)
        delta = real - fake
        loss = w * delta * ((fake3 - x) + (1 - self.alpha) * delta)
        logs = score_gap_logs(x, real, fake, own=k2 == self.kappa[0])
        return self.gain * reduce(loss, self.reduction), logs, w, features
