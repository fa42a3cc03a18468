"""LCD: discrete consistency distillation. CD, Song et al. 2023, arXiv 2303.01469; LCM, Luo et al. 2023, 2310.04378.

    x_t  = alpha_t x + sigma_t eps of a real image x;   t = t_(i + 1),  s = t_i,  i uniform in 0 .. N - 1
    t_i  = i / N; of a table of L levels timestep i L / N - 1, at least 0                       (times.point)
    x_s  = one ODE step of the guided teacher from x_t                      DDIM (LCM), Heun (CD), or exact in tests
    f(x_t, t) = D_student(x_t, t) for t > 0,   f(x_0, 0) = x_0              the boundary
    L    = d( f(x_t, t) - f_target(x_s, s) )                                d: pseudo-Huber per element, or square

The target is an average of the student (CD, LCM) or the student itself (iCT), without gradient. With `embed`, a drawn
guidance scale is the student's input "guidance" (LCM's embedding). On a table the student's calls are on the grid.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.guidance import CFG, scale_of, with_guidance_key
from distill.diffusion.schedule import VP, Schedule, expand
from distill.diffusion.solver import STEPS, Name
from distill.diffusion.times import Grid, point, spread
from distill.losses import Reduction, huber, reduce
from distill.method import Batch, ConsistencyMethod, Logs, Nets, Requirement, guidance_requirements
from distill.random import Draw
from distill.ranges import Decay, Finite, Points, Positive


@dataclass(frozen=True)
class LCD(ConsistencyMethod):
    """Consistency distillation on a grid of the teacher's ODE: needs images (or samples of the teacher)."""

    N: Points = 50  # number of ODE steps from t = 1 to 0: 50 (LCM); 18 CIFAR-10, 40 ImageNet-64 (CD)
    guidance: Finite | tuple[Finite, Finite] = 1.0  # guidance scale w, or a range (LCM: 6, 16). w = omega + 1
    embed: bool = True  # w of a range is an input of the student (LCM); False: it is not (LCM-LoRA, PCM)
    solver: Name = "ddim"  # ODE solver. LCM: ddim; CD: heun; with cfg++ guidance is its lambda
    target_ema: Decay = 0.95  # decay mu of the target's average (CD, LCM); 0: the target is the student itself
    huber_c: Positive | None = 1e-3  # constant of the pseudo-Huber distance (LCM); None: squared error
    reduction: Reduction = "mean"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("target",) if self.target_ema else ()

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return (Requirement.REAL, *guidance_requirements(self.guidance, self.solver, self.embed))

    def call_times(self, steps: int, first: float, schedule: Schedule) -> tuple[float, ...] | None:
        return spread(steps, self.N, schedule) if isinstance(schedule, VP) and first == 1 and steps <= self.N else None

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return self.distance(torch.sub(*self.solutions(x, nets, batch, draw)[:2]))

    def solutions(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Tensor | None]:
        student = nets.student.denoiser
        c = batch.get("real_c")
        w = scale_of(self.guidance, draw, len(x))
        i = Grid(self.N, 0, self.N - 1).index(draw, "t", len(x))
        t = self.time(i + 1, nets)
        s = self.time(i, nets)
        j = self.end_index(i, nets, draw)
        e = None if j is None else self.time(j, nets)
        also = with_guidance_key(c, w) if self.embed else c
        x_t = nets.teacher.path.diffuse(x, draw.normal("eps", x.shape).to(x), t)
        with torch.no_grad():
            x_s = STEPS.get(self.solver, self.solver)(CFG(nets.teacher, w), x_t, t, s, c)  # type: ignore[operator]
            target = self.f(nets.target or student, x_s, s, e, also)
        return self.f(student, x_t, t, e, also), target, j  # both at point j of the grid

    def time(self, i: Tensor, nets: Nets) -> Tensor:
        return point(i, self.N, nets.teacher.path)

    def distance(self, delta: Tensor) -> tuple[Tensor, Logs]:
        loss = delta**2 if self.huber_c is None else huber(delta, self.huber_c)
        return reduce(loss, self.reduction), {"delta": delta.detach().square().mean()}

    def f(self, denoiser: Denoiser, x: Tensor, t: Tensor, e: Tensor | None, c: Condition) -> Tensor:
        pred = denoiser(x, t, c)
        led = pred.x0 if e is None else denoiser.path.diffuse(pred.x0, pred.eps, e)
        return torch.where(expand(t < 0.5 / self.N, x).bool(), x, led)

    def end_index(self, i: Tensor, nets: Nets, draw: Draw) -> Tensor | None:
        return None  # the end time of f: None is data; PCM and TCD have others

    def after_student_step(self, nets: Nets) -> None:
        nets.update_target(self.target_ema)
