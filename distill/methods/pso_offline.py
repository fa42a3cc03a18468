"""PSO offline: Pairwise Sample Optimization on data. Miao et al. 2024, arXiv 2410.03190.

As in pso.py the teacher is a finished student, and the student starts as its copy. x is an image, y a sample of the
teacher under the condition of x, t a uniform time of the student's calls. Both have the same eps:

    x_t  = alpha_t x + sigma_t eps,   y_t = alpha_t y + sigma_t eps
    l(x) = mean over elements of | D(x_t, t) - x |^2 / r_t^2,   r_t = sigma_t / alpha_t        the squared error of eps
    d    = l(x) - n l(y),   d_teacher the same of the teacher                                  n: neg_defactor
    L    = - log sigmoid( beta ( d_teacher - d ) )                                             "sigmoid"
    L    = relu( 1 + beta d ) + gamma l(y)                                                     "hinge", no reference

Means over the batch. gamma preserves what the student made before (prior preservation). n = 1 is the paper's
preference; a smaller n pushes less away from y. Gradients flow through the student's D, not through y. At pure noise, a
flow's first call, r_t is infinite and nothing is learned.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.diffusion.denoiser import Denoiser
from distill.method import Batch, Logs, Method, Nets, Requirement, Update
from distill.random import Draw
from distill.ranges import Positive, Weight


@dataclass(frozen=True)
class OfflinePSO(Method):
    """Preference training of a finished student, with images (a style, a subject) against its own samples."""

    beta: Positive = 5.0  # temperature: SDXL-Turbo, DreamBooth (code)
    loss: Literal["sigmoid", "hinge"] = "hinge"  # loss L; DreamBooth: hinge (code)
    gamma: Weight = 0.5  # gamma, only in the hinge (code)
    neg_defactor: Weight = 1.0  # n, weight of the error on y (paper: 1; default of the DreamBooth script: .1)

    requirements = (Requirement.EXPORTED_TEACHER, Requirement.REAL)

    def on_build(self, nets: Nets) -> None:
        times = torch.tensor(nets.student.times, dtype=torch.float64, device="cpu")
        if (nets.student.denoiser.path.coefficients(times)[0] < 1e-3).all():
            raise ValueError(
                "the student's only call is at pure noise, where offline PSO learns nothing: it needs one of several "
                "calls, or with --student.sigma below"
            )

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss)]

    @torch.no_grad()
    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:  # [B, 2, ...]
        y = replace(nets, student=nets.reference_student).generate({"c": batch.get("real_c")}, draw)
        return torch.stack([batch["real"].to(y), y], 1)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        times = torch.tensor(nets.student.times, dtype=torch.float64, device=x.device)
        t = times[draw.integers("t", len(times))]
        eps = draw.normal("eps", x[:, 0].shape).to(x)

        def errors(denoiser: Denoiser) -> Tensor:  # l(x) and l(y): [2, B]
            alpha, sigma = denoiser.path.coefficients(t)
            preds = [(y, denoiser(denoiser.path.diffuse(y, eps, t), t, batch.get("real_c")).x0) for y in x.unbind(1)]
            return torch.stack([(alpha / sigma).to(y) ** 2 * (x0 - y).flatten(1).square().mean(1) for y, x0 in preds])

        better, worse = errors(nets.student.denoiser)
        gap = better - self.neg_defactor * worse
        logs = {"better": better.mean(), "worse": worse.mean(), "gap": gap.mean()}
        if self.loss == "hinge":
            return (F.relu(1 + self.beta * gap) + self.gamma * worse).mean(), logs
        with torch.no_grad():
            better, worse = errors(nets.teacher)
        return F.softplus(self.beta * (gap - (better - self.neg_defactor * worse))).mean(), logs
