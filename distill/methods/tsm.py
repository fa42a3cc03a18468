"""TSM: teacher score matching of Multi-Student Distillation. Song et al. 2024, arXiv 2410.23274.

    x_t = alpha_t x + sigma_t eps of a real image x under its condition c
    L   = | F_student(x_t, t, c) - F_teacher^w(x_t, t, c) |^2        outputs of the networks, both of the teacher's kind

It makes a smaller network, `--student.network`, a denoiser that a distillation can start from (--student.init). In
expectation its gradient is that of the denoising loss where the teacher is the posterior mean, E[target | x_t], and it
has less variance by that of target - E[target | x_t]. Gradient flows through the student alone.

Multi-Student Distillation (MSD): a partition of the conditions into K parts, each with a student of its own, so that a
sample still costs one call. Any method trains one, on conditions of its part alone: --data.classes, labels that are
equally many in each part and alike. The pairs of a regression (DMD) are shared by all: filtered, modes collapse. Then
python -m pipelines.experts makes one pipeline of all students (pipelines/inference/experts.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.guidance import Guided
from distill.diffusion.times import Law, LogNormal
from distill.losses import Reduction, reduce
from distill.method import Batch, Logs, Method, Nets, Requirement, Update
from distill.random import Draw
from distill.ranges import Finite


@dataclass(frozen=True)
class TSM(Method):
    """A regression of the student onto the teacher's outputs at noisy real images, at every level."""

    guidance: Finite = 1.0  # w of the teacher
    times: Law = LogNormal(-1.2, 1.2)  # EDM's training law
    reduction: Reduction = "mean"  # over all elements

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return Requirement.select(REAL=True, NULL_CONDITION=self.guidance != 1)

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return batch["real"]

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        c, path = batch.get("real_c"), nets.teacher.path
        t, eps = self.times(draw, "t", len(x), path), draw.normal("eps", x.shape).to(x)
        x_t = path.diffuse(x, eps, t)
        with torch.no_grad():
            target = Guided(nets.teacher, self.guidance)(x_t, t, c).out
        return reduce((nets.student.denoiser(x_t, t, c).out - target) ** 2, self.reduction), {}
