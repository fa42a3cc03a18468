"""TCD: trajectory consistency distillation. Zheng et al. 2024, arXiv 2402.19159.

    f(x_t, t, e) = alpha_e x0 + sigma_e eps of D_student(x_t, t)      e <= t;  f(x_e, e, e) = x_e,  f(x_t, t, 0) = x0
    L            = d( f(x_t, t, e) - f_target(x_s, s, e) )            x_s and d as in LCD;  e uniform in 0, 1 / N .. s

The student finds not data alone but every later point of the teacher's ODE, so that it may be called with any share
gamma of new noise between its calls: none (student.renoise "ddim") to all ("fresh"), TCDScheduler's eta. f is the first
order of the semi-linear solution, TCF(1): one prediction for all e, so the network is not told e. With the reach 0 it
is LCD. Gradients flow as in LCD.
"""

from dataclasses import dataclass

from torch import Tensor

from distill.draw import Draw
from distill.methods.lcd import LCD
from distill.ranges import Finite, Share


@dataclass(frozen=True)
class TCD(LCD):
    """Consistency distillation to every point of the teacher's ODE: needs images (or samples of the teacher)."""

    reach: Share = 1.0  # e is uniform up to this share of s (paper: 1)
    guidance: Finite | tuple[Finite, Finite] = (3.0, 15.0)  # of the teacher, embedded. w = omega + 1 (paper: 2, 14)

    def end(self, s: Tensor, draw: Draw) -> Tensor:
        n = (s * self.N).round()  # e = 0 .. reach n, each alike
        steps = (self.reach * n).floor() + 1
        return (draw.uniform("end", (len(s),)).to(s) * steps).floor() / self.N
