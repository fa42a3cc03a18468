"""Denoising score matching: how a teacher is trained. Ho et al. 2020, 2006.11239; EDM, Karras et al. 2022, 2206.00364.

    x_t = alpha_t x + sigma_t eps of a real image x
    L   = | out(x_t) - target(x, eps) |^2            in the network's own space; kind "edm" is EDM's weighting

The condition is dropped with probability `p_drop`, so that the teacher can be guided.
"""

from dataclasses import dataclass

from torch import Tensor

from distill.diffusion.guidance import drop
from distill.diffusion.times import LogNormal, TimeDistribution
from distill.losses import Reduction, denoising
from distill.method import Batch, ImageMethod, Logs, Nets, Requirement
from distill.random import Draw
from distill.ranges import UnitInterval


@dataclass(frozen=True)
class Denoise(ImageMethod):
    """Train the "student" role as a denoiser on real images."""

    p_drop: UnitInterval = 0.1  # probability of a null condition
    times: TimeDistribution = LogNormal(-1.2, 1.2)  # distribution of t: EDM, table 1
    reduction: Reduction = "mean"

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return Requirement.select(REAL=True, NULL_CONDITION=self.p_drop)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        denoiser = nets.student.denoiser
        c = batch.get("real_c")
        if self.p_drop:
            c = drop(c, denoiser.null, draw.uniform("drop", (len(x),)) < self.p_drop)
        x_t, t, eps = self.times.diffuse(x, denoiser.path, draw)
        return denoising(denoiser(x_t, t, c), x, eps, self.reduction), {}
