"""DMD: one-step diffusion with distribution matching distillation. Yin et al. 2023, arXiv 2311.18828.

    x   = G(z, c),   x_t = alpha_t x + sigma_t eps,   real = D_real^w(x_t),   fake = D_fake(x_t)
    g         = (fake - real) / mean| x - real |                            per sample, without gradient
    L_student = x . g + lambda d( G(z', c), y )        y: where the guided teacher's ODE takes z', stored in advance
    L_fake    = | D_fake(x_t) - x |^2                  in the network's own space, on the same x, without gradient

g is that of DMD2 without a GAN. d is that of the regression onto the teacher's ODE (distill/methods/regression.py),
which prevents the collapse of x while the fake score lags. Pairs: python -m pipelines.pairs. Gradients flow through x
and G(z', c), and through the decoder of LPIPS, but not through the scores.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from distill.diffusion.times import Grid, TimeDistribution
from distill.losses import Reduction
from distill.method import Batch, Logs, Method, Nets, Requirement, Update
from distill.methods.dmd2 import DMD2
from distill.methods.regression import Regression
from distill.random import Draw
from distill.ranges import Finite, Positive, Weight


@dataclass(frozen=True)
class DMD(Method):
    """Distribution matching with a regression on stored pairs of the teacher: noise "z", sample "y", condition "c"."""

    guidance: Finite = 1.0  # guidance scale w of the teacher: 3 SD 1.5 (as quoted by SwiftBrush v2); EDM 1
    regression: Weight = 0.25  # lambda, weight of the regression (paper)
    distance: Literal["lpips", "huber", "mse"] = "lpips"  # distance d of the regression (paper: LPIPS)
    decoder: str | None = None  # decoder for LPIPS: folder or Hub name of an AutoencoderTiny; None: the teacher's
    huber_c: Positive = 1e-3  # constant of the pseudo-Huber distance
    times: TimeDistribution = Grid(1000, 20, 980)  # distribution of t in g (paper: 0.02 T .. 0.98 T)
    fake_times: TimeDistribution = Grid(1000, 0, 999)  # distribution of t in the fake score's loss
    reduction: Reduction = "mean"  # mean over all elements, of x . g and of d
    normalise: bool = True  # divide g by mean|x - real| (paper, eq. 8)

    roles = ("fake",)

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        paired = self.ode_regression.requirements if self.regression else ()
        return Requirement.select(NULL_CONDITION=self.guidance != 1) + paired

    @property
    def matching(self) -> DMD2:
        base = DMD2(self.guidance, 1, 0, 0, reduction=self.reduction, normalise=self.normalise)
        return replace(base, times=self.times, fake_times=self.fake_times)

    @property
    def ode_regression(self) -> Regression:
        return Regression(self.distance, self.decoder, self.huber_c, self.reduction)

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss), Update("fake", self.matching.fake_loss, reuse=True)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return nets.generate(batch, draw)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        loss, logs = self.matching.student_loss(x, nets, batch, draw)
        if self.regression:
            logs["regression"], _ = self.ode_regression.student_loss(
                self.ode_regression.sample(nets, batch, draw), nets, batch, draw
            )
            loss = loss + self.regression * logs["regression"]
        return loss, logs
