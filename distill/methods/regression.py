"""Regression: to the teacher's ODE. DMD, Yin et al. 2023, arXiv 2311.18828; start of DMD2's one-step SDXL, 2405.14867.

    y = the guided teacher's ODE sample from unit noise z under c, stored in advance      python -m pipelines.pairs
    L = d( G(z, c), y )       d: LPIPS of the decoded images, pseudo-Huber per element, or square

The optimum is the ODE's own map z -> y, whose samples are the teacher's. The gradient flows through the last call of G
and, for LPIPS, through the frozen decoder.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distill.losses import Reduction, huber, reduce
from distill.method import Batch, Logs, Method, Nets, Requirement, Update
from distill.random import Draw
from distill.ranges import Positive


@dataclass(frozen=True)
class Regression(Method):
    """Regression on stored pairs: the batch gives noise "z" and the teacher's sample "y" [B, *shape] under "c"."""

    distance: Literal["lpips", "huber", "mse"] = "lpips"  # distance d (DMD, DMD2: LPIPS)
    decoder: str | None = None  # decoder for LPIPS: folder or Hub name of an AutoencoderTiny; None: the teacher's
    huber_c: Positive = 1e-3  # constant of the pseudo-Huber distance
    reduction: Reduction = "mean"  # huber and mse: over all elements; LPIPS is a mean over the batch

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return Requirement.select(PAIRS=True, PERCEPTUAL_DISTANCE=self.distance == "lpips")

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return nets.student.generate(batch["z"], batch.get("c"), draw)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        y = batch["y"].to(x)
        delta = x - y
        if self.distance == "lpips":
            if nets.perceptual is None:
                raise ValueError(
                    "distance 'lpips' needs nets.perceptual (pipelines.judges.perceptual); or use 'huber', 'mse'"
                )
            loss = nets.perceptual(x, y).mean()
        else:
            loss = reduce(delta**2 if self.distance == "mse" else huber(delta, self.huber_c), self.reduction)
        return loss, {"mse": delta.detach().square().mean()}
