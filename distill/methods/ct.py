"""ECT and iCT: consistency training. Geng et al. 2024, arXiv 2406.14548; Song & Dhariwal 2023, arXiv 2310.14189.

    x_t  = alpha_t x + sigma_t eps,   x_r = alpha_r x + sigma_r eps      a real image x, one eps;  s = sigma / alpha
    f(x_t, t) = D_student(x_t, t),    f(x_0, 0) = x of the image itself              the boundary
    L    = d( f(x_t, t) - sg f(x_r, r) ) / (s_t - s_r),   d(y) = sqrt( |y|^2 + c^2 ) - c     of a sample's whole vector
    ECT  : s_t log-normal, s_r / s_t from 0 to 1 in stages;   iCT: neighbours of a grid whose steps halve in stages

The noise that made x_t replaces the teacher's ODE step: it is right on average as s_r approaches s_t. With s_r = 0 the
loss is denoising. The teacher only initialises the student (ECT; iCT starts from nothing) and is never called.
Gradients flow only through f(x_t, t). The loss is a mean over samples, not elements.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.curriculum import Curriculum, ECTCurriculum
from distill.diffusion.denoiser import Condition
from distill.diffusion.schedule import Schedule, expand
from distill.losses import cauchy_norm, huber_norm
from distill.method import Batch, ConsistencyMethod, Logs, Nets, Requirement
from distill.random import Draw
from distill.ranges import Weight


@dataclass(frozen=True)
class CT(ConsistencyMethod):
    """Consistency training on real images: no teacher's ODE, one network call with gradient and one without."""

    curriculum: Curriculum = ECTCurriculum()  # curriculum of the two levels: ECTCurriculum or ICTCurriculum
    distance: Literal["huber", "square", "cauchy"] = "huber"  # d; square: |y|^2; cauchy: log(1 + |y|^2 / (2 c^2))
    c: Weight = 0.0  # c of d. ECT CIFAR-10: 0; iCT: 0.00054 sqrt(elements): 0.03 CIFAR-10, 0.06 ImageNet-64
    weighted: bool = True  # weight the loss by 1 / (s_t - s_r)
    c_out: bool = False  # weight it by 1 / c_out(s_t)^2 instead, the scale of EDM's output (TCM's authors, ImageNet-64)

    requirements = (Requirement.REAL,)

    def __post_init__(self) -> None:
        if self.distance == "cauchy" and not self.c:
            raise ValueError(f"c is {self.c}; the Cauchy distance needs a c above 0")

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        path = nets.student.denoiser.path
        c = batch.get("real_c")
        t, r, gap = self.pairs(draw, len(x), path)
        eps = self.noise(x, c, draw)
        with torch.no_grad():
            target = torch.where(expand(r, x) > 0, self.f(nets, path.diffuse(x, eps, r), r, c), x)
        out = nets.student.denoiser(path.diffuse(x, eps, t), t, c).x0
        delta = out - target
        divisor = gap.to(x) if self.weighted else 1.0
        if self.c_out:
            s = path.ratio(t)
            sigma_d = nets.student.denoiser.sigma_d
            divisor = ((s * sigma_d) ** 2 / (s**2 + sigma_d**2)).to(x)
        loss = self.sample_distance(delta, draw) / divisor + self.denoising_term(out - x, path.ratio(t))
        return loss.mean(), {"delta": delta.detach().square().mean(), "clean": (r == 0).float().mean()}

    def pairs(self, draw: Draw, B: int, path: Schedule) -> tuple[Tensor, Tensor, Tensor]:  # t, r, s_t - s_r [B]
        return self.curriculum(draw, B, path)

    def f(self, nets: Nets, x: Tensor, t: Tensor, c: Condition) -> Tensor:  # of the target
        return nets.student.denoiser(x, t, c).x0

    def noise(self, x: Tensor, c: Condition, draw: Draw) -> Tensor:
        return draw.normal("eps", x.shape).to(x)

    def denoising_term(self, error: Tensor, s: Tensor) -> Tensor | float:  # [B], of f(x_t, t) - x at the level s (sLCT)
        return 0.0

    def sample_distance(self, delta: Tensor, draw: Draw) -> Tensor:  # [B]
        if self.distance == "square":
            return delta.flatten(1).square().sum(1)
        return (huber_norm if self.distance == "huber" else cauchy_norm)(delta, self.c)
