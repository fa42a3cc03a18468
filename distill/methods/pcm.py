"""PCM: phased consistency models. Wang et al. 2024, arXiv 2405.18407.

    0 = e_1 < e_2 < ... < e_M < 1,   e_m = floor((m - 1) N / M) / N          phases of the grid of LCD
    f(x_t, t) = alpha_e x0 + sigma_e eps of D_student(x_t, t), e the start of the phase of t;   so f(x_e, e) = x_e
    L_student = d( f(x_t, t) - f_target(x_s, s) ) + lambda mean relu(1 - l(f(x_t, t)))       x_s and d as in LCD
    L_heads   = mean relu(1 + l(f(x_t, t))) + mean relu(1 - l(f_target(x_s, s)))             other t and eps
    l(x_e)    = heads(features of the frozen teacher at x_u, u)   x_e noised on to u, uniform in the phase from e on

The student need not find data from everywhere, only the start of a phase: M calls, at t = 1 and e_M, ..., e_2, follow
the teacher's ODE without new noise (student.renoise "ddim"). With N a multiple of M these are the timesteps that
samplers call "trailing". M = 1 is LCD. With guidance 1 the student keeps to the teacher unguided, and takes guidance
and negative prompts when it is sampled. The adversarial loss compares laws where d compares points: both are the same
when the student is right, and few steps gain by it. Gradients as in LCD, and through the teacher's features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.denoiser import Condition
from distill.disc import verdicts
from distill.draw import Draw
from distill.guidance import repeated
from distill.losses import hinge_discriminator
from distill.methods.lcd import LCD
from distill.ranges import Count, Decay, Finite, Weight
from distill.schedule import expand
from distill.trainer import Batch, Logs, Nets, Update


@dataclass(frozen=True)
class PCM(LCD):
    """Consistency distillation within phases of the teacher's ODE: needs images (or samples of the teacher)."""

    phases: Count = 4  # M (code)
    N: Count = 50  # code; 40 SDXL, 100 SD3
    guidance: Finite | tuple[Finite, Finite] = 5.5  # of the teacher. w = omega + 1 (code: 5 to 6; SDXL 7 to 8)
    target_ema: Decay = 0.0  # the student itself (code)
    gan: Weight = 0.1  # lambda, on a mean over logits (code, SDXL; SD 1.5 of 4 phases: 0)
    taps: tuple[str, ...] = ("mid_block",)  # blocks of the teacher with a head each (code: down and mid, 4 heads each)
    places: bool = True  # every token or patch has a logit of its own (code)

    def __post_init__(self) -> None:
        if not 1 <= self.phases <= self.N:
            raise ValueError(f"phases is {self.phases}; it must be 1 to N = {self.N}, the steps of the grid")

    @property
    def roles(self) -> tuple[str, ...]:
        return (*super().roles, "disc") if self.gan else super().roles

    def updates(self) -> list[Update]:
        return super().updates() + ([Update("fake", self.fake_loss, reuse=True)] if self.gan else [])

    @property
    def edges(self) -> tuple[float, ...]:
        """The starts e_1, ..., e_M of the phases; a student's times are 1 and, falling, all but the first."""
        return tuple(m * self.N // self.phases / self.N for m in range(self.phases))

    def end(self, s: Tensor, draw: Draw) -> Tensor:
        edges = torch.tensor(self.edges, dtype=torch.float64, device=s.device)
        return edges[torch.searchsorted((edges * self.N).round(), torch.round(s * self.N), right=True) - 1]

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        out, target, e = self.solutions(x, nets, batch, draw)
        loss, logs = self.distance(out - target)
        if self.gan:
            logs["gan"] = F.relu(1 - self.logits([out], e, batch.get("real_c"), nets, draw)).mean()
            loss = loss + self.gan * logs["gan"]
        return loss, logs

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        with torch.no_grad():
            out, target, e = self.solutions(x, nets, batch, draw)
        fake, real = self.logits([out, target], e, batch.get("real_c"), nets, draw).chunk(2)
        return hinge_discriminator(fake, real), {"gan_right": verdicts(fake, real)}

    def logits(self, xs: list[Tensor], e: Tensor | None, c: Condition, nets: Nets, draw: Draw) -> Tensor:
        assert e is not None and nets.disc is not None
        path, n = nets.teacher.path, len(xs)
        u, on = e + draw.uniform("gan_t", (len(e),)).to(e) / self.phases, expand(e, xs[0]) > 0  # at e = 0 it is x0
        eps = [draw.normal(f"gan_eps{i}", x.shape).to(x) for i, x in enumerate(xs)]
        x_u = [
            torch.where(on, path.transition(x, e, u, z), path.diffuse(x, z, u)) for x, z in zip(xs, eps, strict=True)
        ]
        return nets.disc(*nets.teacher.features(torch.cat(x_u), u.repeat(n), repeated(c, n), self.taps))
