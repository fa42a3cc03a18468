"""TSM: teacher score matching of Multi-Student Distillation. Song et al. 2024, arXiv 2410.23274.

    x_t = alpha_t x + sigma_t eps of a real image x under its condition c
    L   = | F_student(x_t, t, c) - F_teacher^w(x_t, t, c) |^2        outputs of the networks, both of the teacher's kind

It trains a smaller network, `--student.network`, to a denoiser from which a distillation can start (--student.init). If
the teacher is the posterior mean E[target | x_t], the expected gradient is that of the denoising loss. Its variance is
lower by that of target - E[target | x_t]. The gradient flows only through the student.

Multi-Student Distillation (MSD): the conditions are divided into K groups with one student each, so that a sample still
costs one call. Any method trains one student on the conditions of its group: --data.classes, labels of equal number and
similar kind in each group. All students share the pairs of a regression (DMD): if these are filtered, modes collapse.
python -m pipelines.experts then makes one pipeline of all students (pipelines/inference/experts.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.guidance import CFG
from distill.diffusion.times import LogNormal, TimeDistribution
from distill.losses import Reduction, reduce
from distill.method import Batch, ImageMethod, Logs, Nets, Requirement
from distill.random import Draw
from distill.ranges import Finite


@dataclass(frozen=True)
class TSM(ImageMethod):
    """A regression of the student onto the teacher's outputs at noisy real images, at every level."""

    guidance: Finite = 1.0  # guidance scale w of the teacher
    times: TimeDistribution = LogNormal(-1.2, 1.2)  # distribution of t: EDM's training law
    reduction: Reduction = "mean"  # mean over all elements

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return Requirement.select(REAL=True, NULL_CONDITION=self.guidance != 1)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        c = batch.get("real_c")
        x_t, t, _ = self.times.diffuse(x, nets.teacher.path, draw)
        with torch.no_grad():
            target = CFG(nets.teacher, self.guidance)(x_t, t, c).out
        return reduce((nets.student.denoiser(x_t, t, c).out - target) ** 2, self.reduction), {}
