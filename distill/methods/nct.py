"""NCT: noise consistency training of a control. Luo et al. 2025, arXiv 2506.19741.

    x = f(z),   y = c(x)                                the finished generator, frozen, and a picture of its sample
    z_s = sqrt(1 - s^2) z + s eps                       unit noise again; z_0 = z, and z_1 = eps knows nothing of y
    L_con   = | f'(z_u, y) - sg f'(z_s, y) |^2          s, u = k / K, (k + 1) / K, k uniform below K; the same eps
    L_bound = | f'(z, y) - x |^2
    L = L_con + lambda L_bound,      lambda <- max(0, lambda + eta (E L_bound - xi)) after every step

f' is f with an adapter that takes y. L_con carries what is right at z_0 over to noise that is independent of y. Without
L_bound all samples become equal. Gradients flow only through f'(z_u, y) and f'(z, y) to the adapter.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.schedule import expand
from distill.losses import Reduction, huber, reduce
from distill.method import Batch, Logs, Method, Nets, Requirement, Update
from distill.networks.multiplier import Multiplier, multiplier
from distill.random import Draw
from distill.ranges import Points, Positive, Weight


@dataclass(frozen=True)
class NCT(Method):
    """A control adapter on a finished generator, which is the teacher: needs no images"""

    control: Literal["canny", "downsample", "gray"] = "canny"  # c (paper: Canny, HED, depth, 8x super-resolution)
    factor: Points = 8  # factor of "downsample" (paper: 8)
    levels: Points = 10  # number of levels K; K, dual, rate and bound are ours: we do not know the paper's values
    dual: Weight = 1.0  # initial lambda, for the mean; with rate 0 it is constant
    rate: Weight = 1.0  # eta, step size of lambda
    bound: Weight = 1e-3  # xi, bound of L_bound after its reduction
    huber_c: Positive | None = None  # constant of the pseudo-Huber distance; None: squared error
    reduction: Reduction = "mean"  # reduction of both losses
    control_decoder: str | None = None  # decoder for c: folder or Hub name of an AutoencoderTiny; None: the teacher's

    requirements = (Requirement.EXPORTED_TEACHER, Requirement.CONTROL_PICTURE)

    def on_build(self, nets: Nets) -> None:
        nets.student.denoiser.net.multiplier = Multiplier(self.dual)

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss)]

    @torch.no_grad()
    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return replace(nets, student=nets.reference_student).generate(batch, draw)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        if nets.control is None:
            raise ValueError("NCT needs nets.control, which makes the picture of a sample (pipelines.control)")
        dual = multiplier(nets.student.denoiser.net)
        c = (batch.get("c") or {}) | {"control": nets.control(x)}
        z = draw.normal("z", x.shape)
        eps = draw.normal("eps", x.shape)
        k = draw.integers("k", self.levels)

        def f(k: Tensor) -> Tensor:
            s = expand(k / self.levels, z)
            return nets.student.generate((1 - s**2).sqrt() * z + s * eps, c, draw)

        with torch.no_grad():
            target = f(k)
        consistency = self.distance(f(k + 1) - target)
        boundary = self.distance(f(0 * k) - x)
        dual.record(boundary, draw.step)
        logs = {"consistency": consistency, "boundary": boundary, "lambda": dual.value.clone()}
        return consistency + dual.value * boundary, {name: value.detach() for name, value in logs.items()}

    def distance(self, delta: Tensor) -> Tensor:
        return reduce(delta**2 if self.huber_c is None else huber(delta, self.huber_c), self.reduction)

    def after_student_step(self, nets: Nets) -> None:
        multiplier(nets.student.denoiser.net).step(self.rate, self.bound)
