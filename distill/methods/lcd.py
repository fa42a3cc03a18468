"""LCD: discrete consistency distillation. CD, Song et al. 2023, arXiv 2303.01469; LCM, Luo et al. 2023, 2310.04378.

    x_t  = alpha_t x + sigma_t eps of a real image x;   t = (i + 1) / N,  s = i / N,  i uniform in 0 .. N - 1
    x_s  = one ODE step of the guided teacher from x_t                      DDIM (LCM), Heun (CD), or exact in tests
    f(x_t, t) = D_student(x_t, t) for t > 0,   f(x_0, 0) = x_0              the boundary
    L    = d( f(x_t, t) - f_target(x_s, s) )                                d: pseudo-Huber per element, or square

The target is an average of the student (CD, LCM) or the student itself (iCT), always without gradient. A range of
guidance is drawn per sample and told to the student as the condition "guidance" (LCM's embedding), unless `embed` is
off.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.draw import Draw
from distill.ema import follow
from distill.guidance import Guided, needed, scale_of, told
from distill.losses import Reduction, huber, reduce
from distill.ranges import Count, Decay, Finite, Positive
from distill.schedule import expand
from distill.solver import STEPS, Name, jump
from distill.times import Grid
from distill.trainer import Batch, Logs, Nets, Update


@dataclass(frozen=True)
class LCD:
    """Consistency distillation on a grid of the teacher's ODE: needs images (or samples of the teacher)."""

    N: Count = 50  # ODE steps from t = 1 to 0: 50 (LCM); 18 CIFAR-10, 40 ImageNet-64 (CD)
    guidance: Finite | tuple[Finite, Finite] = 1.0  # of the teacher, or a range of it (LCM: 6, 16). w = omega + 1
    embed: bool = True  # the student is told the w of a range (LCM); False: it is not (LCM-LoRA's and PCM's scripts)
    solver: Name = "ddim"  # LCM: ddim; CD: heun; under cfg++ guidance is its lambda
    target_ema: Decay = 0.95  # mu of the target (CD, LCM); 0: the student itself
    huber_c: Positive | None = 1e-3  # of the pseudo-Huber distance (LCM); None: squared error
    reduction: Reduction = "mean"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("target",) if self.target_ema else ()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("real", *needed(self.guidance, self.solver, self.embed))

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return batch["real"]

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        out, target, _ = self.solutions(x, nets, batch, draw)
        return self.distance(out - target)

    def solutions(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Tensor | None]:
        """f(x_t, t), f_target(x_s, s), both at e [B], and e."""
        student, c, path = nets.student.denoiser, batch.get("real_c"), nets.teacher.path
        t, eps = Grid(self.N + 1, 1, self.N)(draw, "t", len(x), path), draw.normal("eps", x.shape).to(x)
        w = scale_of(self.guidance, draw, len(x))
        x_t, s = path.diffuse(x, eps, t), t - 1 / self.N
        e, c_w = self.end(s, draw), told(c, w) if self.embed else c
        with torch.no_grad():
            solver = STEPS[self.solver] if isinstance(self.solver, str) else self.solver
            x_s = solver(Guided(nets.teacher, w), x_t, t, s, c)
            target = self.f(nets.target or student, x_s, s, e, c_w)
        return self.f(student, x_t, t, e, c_w), target, e

    def distance(self, delta: Tensor) -> tuple[Tensor, Logs]:
        loss = delta**2 if self.huber_c is None else huber(delta, self.huber_c)
        return reduce(loss, self.reduction), {"delta": delta.detach().square().mean()}

    def f(self, denoiser: Denoiser, x: Tensor, t: Tensor, e: Tensor | None, c: Condition) -> Tensor:
        return torch.where(expand(t < 0.5 / self.N, x).bool(), x, jump(denoiser(x, t, c), denoiser.path, e))

    def end(self, s: Tensor, draw: Draw) -> Tensor | None:
        return None  # where f leads to: to data (not in PCM and TCD)

    def after(self, nets: Nets) -> None:
        if nets.target is not None:
            follow(nets.target.net, nets.student.denoiser.net, self.target_ema)
