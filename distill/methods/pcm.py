"""PCM: phased consistency models. Wang et al. 2024, arXiv 2405.18407.

    0 = e_1 < e_2 < ... < e_M < 1,   e_m = floor((m - 1) N / M) / N          phases of the grid of LCD
    f(x_t, t) = alpha_e x0 + sigma_e eps of D_student(x_t, t), e the start of the phase of t;   so f(x_e, e) = x_e
    L         = d( f(x_t, t) - f_target(x_s, s) )                            x_s and d as in LCD, both with the e of t

The student need not find data from everywhere, only the start of a phase: M calls, at t = 1 and e_M, ..., e_2, follow
the teacher's ODE without new noise (student.renoise "ddim"). With N a multiple of M these are the timesteps that
samplers call "trailing". M = 1 is LCD. With guidance 1 the student keeps to the teacher unguided, and takes guidance
and negative prompts when it is sampled. The adversarial loss that the paper may add is left out. Gradients as in LCD.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.draw import Draw
from distill.methods.lcd import LCD
from distill.ranges import Count, Decay, Finite


@dataclass(frozen=True)
class PCM(LCD):
    """Consistency distillation within phases of the teacher's ODE: needs images (or samples of the teacher)."""

    phases: Count = 4  # M (code)
    N: Count = 50  # code; 40 SDXL, 100 SD3
    guidance: Finite | tuple[Finite, Finite] = 5.5  # of the teacher. w = omega + 1 (code: 5 to 6; SDXL 7 to 8)
    target_ema: Decay = 0.0  # the student itself (code)

    def __post_init__(self) -> None:
        if not 1 <= self.phases <= self.N:
            raise ValueError(f"phases is {self.phases}; it must be 1 to N = {self.N}, the steps of the grid")

    @property
    def edges(self) -> tuple[float, ...]:
        """The starts e_1, ..., e_M of the phases; a student's times are 1 and, falling, all but the first."""
        return tuple(m * self.N // self.phases / self.N for m in range(self.phases))

    def end(self, s: Tensor, draw: Draw) -> Tensor:
        edges = torch.tensor(self.edges, dtype=torch.float64, device=s.device)
        return edges[torch.searchsorted((edges * self.N).round(), torch.round(s * self.N), right=True) - 1]
