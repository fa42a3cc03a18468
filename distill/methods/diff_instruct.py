"""Diff-Instruct: a universal approach for transferring knowledge from diffusion models. Luo et al. 2023, 2305.18455.

    x         = G(z, c),   x_t = alpha_t x + sigma_t eps,   t and eps new for each sample
    IKL       = integral over t of w_t KL( law of x_t of the student || of the teacher )
    g         = w_t (alpha_t / sigma_t)^2 ( D_fake(x_t) - D_real(x_t) )     IKL's gradient to x, without gradient
    L_student = x . g
    L_fake    = | D_fake(x_t) - x |^2                  in the network's own space, x without gradient

w_t = (sigma_t / alpha_t)^2 in the authors' code, so that g is the plain difference of the denoisers; w = 1 gives the KL
itself. There is no normaliser, guidance or data. The fake score is updated first. Each player has its own samples.
Gradients flow only through x.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.schedule import expand
from distill.diffusion.times import LogNormal, TimeDistribution
from distill.losses import Reduction, denoising, gradient_surrogate, reduce, score_gap_logs
from distill.method import Batch, Logs, Method, Nets, Update
from distill.random import Draw
from distill.ranges import Calls


@dataclass(frozen=True)
class DiffInstruct(Method):
    """The integral KL between student and teacher over all levels of noise: data-free."""

    weight: Literal["ratio", "one"] = "ratio"  # w_t: (sigma_t / alpha_t)^2 (code), or 1
    fake_steps: Calls = 1  # fake score steps per student step (code: 1)
    times: TimeDistribution = LogNormal(-1.2, 1.2)  # distribution of t in the student's loss (code: EDM's training law)
    fake_times: TimeDistribution = LogNormal(-1.2, 1.2)  # distribution of t in the fake score's loss (code)
    reduction: Reduction = "sum"  # sum over elements, mean over the batch (code)

    roles = ("fake",)

    def __post_init__(self) -> None:
        if self.weight not in ("ratio", "one"):
            raise ValueError(f"weight is {self.weight!r}; it must be 'ratio', (sigma / alpha)^2, or 'one'")

    def updates(self) -> list[Update]:
        return [Update("fake", self.fake_loss), Update("student", self.student_loss, self.fake_steps)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return nets.generate(batch, draw, 1 + draw.index("steps", len(nets.student.times)))

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        c = batch.get("c")
        path = nets.teacher.path
        with torch.no_grad():
            x_t, t, _ = self.times.diffuse(x, path, draw)
            real = nets.teacher(x_t, t, c).x0
            fake = nets.fake_score(x_t, t, c).x0
            gap = fake - real
            g = gap if self.weight == "ratio" else gap / expand(path.ratio(t) ** 2, x)
        return reduce(gradient_surrogate(x, g), self.reduction), score_gap_logs(x, real, fake)

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        x_t, t, eps = self.fake_times.diffuse(x, nets.fake_score.path, draw)
        return denoising(nets.fake_score(x_t, t, batch.get("c")), x, eps, self.reduction), {}
