"""PCM: phased consistency models. Wang et al. 2024, arXiv 2405.18407.

    T_1 > T_2 > ... > T_M > t_0       the student's M times are the starts of its phases; the last one ends at t_0
    f(x_t, t) = alpha_e x0 + sigma_e eps of D_student(x_t, t), e the end of the phase of t;     so f(x_e, e) = x_e
    L_student = d( f(x_t, t) - f_target(x_s, s) ) + lambda mean relu(1 - l(f(x_t, t)))       t, s, x_s and d as in LCD
    L_heads   = mean relu(1 + l(f(x_t, t))) + mean relu(1 - l(f_target(x_s, s)))             other t and eps
    l(x_e)    = heads(features of the frozen teacher at x_u, u)   x_e noised on to u, uniform in the phase above e

The grid has N steps, evenly within each phase. t_0 is a table's timestep 0, which is a level of noise, and the end of
the last call (student.renoise "tcd"); on other schedules it is data. The student need not reach data from every time:
its calls follow the teacher's ODE without new noise. With guidance 1 it matches the unguided teacher, and takes
guidance and negative prompts in sampling. The adversarial loss compares distributions where d compares points. Its
means are over heads, of means over pixels. Gradients flow as in LCD, and through the teacher's features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.denoiser import Condition
from distill.diffusion.guidance import repeat_condition
from distill.diffusion.student import check_phases
from distill.diffusion.times import phase, pieces
from distill.losses import hinge_discriminator
from distill.method import Batch, FeatureTaps, Logs, Nets, Taps, Update
from distill.methods.lcd import LCD
from distill.networks.discriminator import accuracy, head_logits
from distill.random import Draw
from distill.ranges import Decay, Finite, Weight


@dataclass(frozen=True)
class PCM(LCD):
    """Consistency distillation within phases of the teacher's ODE: needs images (or samples of the teacher)."""

    guidance: Finite | tuple[Finite, Finite] = 5.5  # guidance w, no input. w = omega + 1 (code: 5 to 6; SDXL 7 to 8)
    target_ema: Decay = 0.0  # 0: the target is the student itself (code)
    gan: Weight = 0.1  # lambda, weight of the GAN loss (code, SDXL; SD 1.5 of 4 phases: 0)
    taps: Taps = None  # blocks of the teacher with a head each (code: down and mid, 4 heads each)
    embed: bool = False  # False: w is not an input of the student (code)
    noises = ("ddim", "tcd")

    @property
    def roles(self) -> tuple[str, ...]:
        return (*super().roles, "disc") if self.gan else super().roles

    @property
    def feature_taps(self) -> dict[str, FeatureTaps]:
        return {"disc": FeatureTaps(self.taps, pixels=True)}  # heads of 1x1 convolutions, one logit per pixel (code)

    def call_times(self, steps: int, first: float, schedule: object) -> None:
        """None: the times of the exported scheduler, which are the phases."""

    def on_build(self, nets: Nets) -> None:
        check_phases(nets.student, self.N)  # raises ValueError

    def updates(self) -> list[Update]:
        return super().updates() + ([Update("fake", self.fake_loss, reuse=True)] if self.gan else [])

    def time(self, i: Tensor, nets: Nets) -> Tensor:
        return pieces(i, self.N, nets.student.times, nets.teacher.path)

    def end_index(self, i: Tensor, nets: Nets, draw: Draw) -> Tensor:
        return phase(i, self.N, len(nets.student.times))[0]

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        out, target, j = self.solutions(x, nets, batch, draw)
        loss, logs = self.distance(out - target)
        if self.gan:
            logits = self.logits([out], j, batch.get("real_c"), nets, draw)
            logs["gan"] = torch.stack([torch.relu(1 - one).mean() for one in logits]).mean()
            loss = loss + self.gan * logs["gan"]
        return loss, logs

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        with torch.no_grad():
            out, target, j = self.solutions(x, nets, batch, draw)
        pairs = [one.chunk(2) for one in self.logits([out, target], j, batch.get("real_c"), nets, draw)]
        right = accuracy(*(torch.cat(side, 1) for side in zip(*pairs, strict=True)))
        return torch.stack([hinge_discriminator(*pair) for pair in pairs]).mean(), {"gan_right": right}

    def logits(self, xs: list[Tensor], j: Tensor | None, c: Condition, nets: Nets, draw: Draw) -> list[Tensor]:
        assert j is not None and nets.disc is not None  # j: grid points of xs
        teacher = nets.teacher
        start, end = phase(j, self.N, len(nets.student.times))
        e, u = (self.time(i, nets) for i in (j, start + draw.uniform("gan_t", (len(j),)).to(j) * (end - start)))
        x_u = [teacher.path.transition(x, e, u, draw.normal(f"gan_eps{i}", x.shape).to(x)) for i, x in enumerate(xs)]
        c = repeat_condition(c, len(xs))
        return head_logits(nets.disc, teacher.features(torch.cat(x_u), u.repeat(len(xs)), c, self.taps))
