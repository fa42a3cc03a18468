"""TCM: truncated consistency models. Lee et al. 2024, arXiv 2410.14895.

    f(x_t, t) = D_student(x_t, t) where s_t >= s',   D_frozen(x_t, t) below;     s = sigma / alpha
    L_C = mean of d( f(x_t, t) - sg f(x_r, r) ) / (s_t - s_r),  s_t of a law above s'         as CT
    L_B = the same at s_t = s'; all its targets are the frozen network's                      the boundary
    L   = L_C + w_b L_B                                         a fraction rho of the samples is for L_B

The second stage of CT. The student of the first stage knows every level and spends its capacity on denoising, which a
generator does not need. Here a frozen copy answers below s', and the student learns only from s' on: do not call it
below. Start it from the first stage's student (student.init), with pairs as close as its last ones. By default both are
the teacher. Gradients flow as in CT, none to the frozen network.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.curriculum import ECTCurriculum
from distill.diffusion.denoiser import Condition
from distill.diffusion.schedule import Schedule, expand
from distill.diffusion.times import StudentT
from distill.methods.ct import CT
from distill.random import Draw
from distill.ranges import MOST, Decay, Positive, Weight
from distill.roles import Nets


@dataclass(frozen=True)
class TCM(CT):
    """Consistency training of high levels only, with a frozen student of all levels: needs images and that student."""

    curriculum: ECTCurriculum = ECTCurriculum(StudentT(), q=1000.0, every=MOST)  # 1 - s_r / s_t = n(s_t) / 1000 (code)
    c: Weight = 1e-8  # CIFAR-10 (code); ImageNet-64 .06, with q = 256 and c_out
    start: Positive = 1.0  # s', the boundary level
    boundary: Decay = 0.25  # rho: exact fraction of the samples of a step at the boundary
    weight: Weight = 0.1  # w_b, weight of the boundary loss

    roles = ("target",)

    def call_times(self, steps: int, first: float, schedule: Schedule) -> tuple[float, ...] | None:
        start = float(schedule.time(torch.tensor([self.start], dtype=torch.float64)))
        return (first, start) if steps == 2 and first > start else None

    def on_build(self, nets: Nets) -> None:
        times = torch.tensor(nets.student.times, dtype=torch.float64)
        levels = nets.student.denoiser.path.ratio(times)
        path = nets.student.denoiser.path
        if levels.min() < self.start * (1 - 1e-3):
            start = float(path.time(torch.tensor([self.start], dtype=torch.float64)))
            raise ValueError(
                f"the student is called at sigma / alpha = {[round(s, 4) for s in levels.tolist()]}, and TCM trains it "
                f"from method.start = {self.start} on: pass --student.times, none of them below {start:.6g}"
            )

    def pairs(self, draw: Draw, B: int, path: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        t = self.curriculum.times(draw, "t", B, path)
        start = path.time(torch.tensor([self.start], dtype=torch.float64, device=t.device))
        return self.curriculum.pairs_below(torch.where(self.bound(draw), start, t.maximum(start)), draw.step, path)

    def bound(self, draw: Draw) -> Tensor:  # [B]: which samples are at the boundary, by their number in the batch
        i = draw.samples.double()
        return ((i + 1) * self.boundary).floor() > (i * self.boundary).floor()

    def f(self, nets: Nets, x: Tensor, t: Tensor, c: Condition) -> Tensor:
        assert nets.target is not None
        low = nets.target.path.ratio(t) < self.start
        return torch.where(expand(low, x).bool(), nets.target(x, t, c).x0, super().f(nets, x, t, c))

    def sample_distance(self, delta: Tensor, draw: Draw) -> Tensor:
        rho = self.boundary
        bound = self.bound(draw).to(delta)
        share = bound * self.weight / (rho or 1.0) + (1 - bound) / (1 - rho)
        return super().sample_distance(delta, draw) * share
