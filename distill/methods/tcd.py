"""TCD: trajectory consistency distillation. Zheng et al. 2024, arXiv 2402.19159.

    f(x_t, t, e) = alpha_e x0 + sigma_e eps of D_student(x_t, t)      e <= t;  f(x_e, e, e) = x_e
    L            = d( f(x_t, t, e) - f_target(x_s, s, e) )            x_s and d as in LCD;  e uniform in t_0, t_1 .. s

The student learns every later point of the teacher's ODE, not only data. So its calls may have any fraction gamma of
new noise between them: none (student.renoise "tcd") to all ("fresh"), TCDScheduler's eta. f is the first order of the
semi-linear solution, TCF(1): one prediction for all e, so the network has no input e. No network is right for all e
unless the ODE is a line. For a Gaussian of deviation .6, a perfect student's four samples on SD's table have 1.13 times
the deviation without new noise, .80 times with it (test_sampling.py); PCM's have its own. t_0 is a level of noise, too
(of a table .029), and the end of "tcd". Gradients flow as in LCD.
"""

from dataclasses import dataclass

from torch import Tensor

from distill.methods.lcd import LCD
from distill.random import Draw
from distill.ranges import Finite, UnitInterval
from distill.roles import Nets


@dataclass(frozen=True)
class TCD(LCD):
    """Consistency distillation to every point of the teacher's ODE: needs images (or samples of the teacher)."""

    reach: UnitInterval = 1.0  # e is uniform up to this fraction of the points to s (paper: 1)
    guidance: Finite | tuple[Finite, Finite] = (3.0, 15.0)  # guidance scale w, embedded. w = omega + 1 (paper: 2, 14)
    noises = ("fresh", "ddim", "tcd")

    def end_index(self, i: Tensor, nets: Nets, draw: Draw) -> Tensor:
        steps = (self.reach * i).floor() + 1  # e = t_0 .. t_(reach i), uniform
        return (draw.uniform("end", (len(i),)).to(i) * steps).floor()
