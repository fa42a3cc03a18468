"""Phased DMD: few-step distribution matching via score matching within subintervals. Fan et al. 2025, arXiv 2510.27684.

    The student's calls are in phases that end at 1 > s_1 > s_2 > ... > 0, an expert each. A phase whose end is s:
    x_s = R(z, c)  at a uniform exit among the phase's calls, brought to s; gradient through the last call and to s
    x_t = a x_s + b eps,   a = alpha_t / alpha_s,   b^2 = sigma_t^2 - a^2 sigma_s^2,   t of a law, given t > s
    D^s(x_t)  = (a sigma_s^2 x_t + alpha_s b^2 D(x_t)) / sigma_t^2           E[x_s | x_t], from D = E[x_0 | x_t]
    g         = (D_fake^s - D_real^{s,w}) / mean| x_s - D_real^{s,w} |       per sample, without gradient
    L_student = x_s . g
    L_fake    = min(1, clamp b^2) | out - target |^2                   in the fake network's own space

The target is that of (x_0, eps) with x_0 = x_s / alpha_s - alpha_t sigma_s^2 eps / (alpha_s^2 b) and (sigma_t / b) eps:
unbiased without x_0. So phase k is DMD2 on the path above s, whose data is x_s (interval.py). Its g is b^2 / a times
the difference of scores, DMD2's is sigma_t^2 / alpha_t times; the KL's own weight is a. The last phase has s = 0 and is
DMD2. A run trains one phase, with the earlier experts frozen: --student.phases 2, and then also --student.experts
FIRST/checkpoint-N. The fake score starts as the teacher in each. Gradients flow as in DMD2.

LightX2V's code updates x_0 of the call by D_fake - D_real, over mean| x_0 - D_real |, although x_t is made from x_s.
This changes each sample's call in the same direction as g, with another weight. g is kept: it descends the divergence
of x_t.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.diffusion.interval import Interval, Tail
from distill.diffusion.times import Grid, TimeDistribution
from distill.method import Batch, Logs, Nets
from distill.methods.dmd2 import DMD2
from distill.random import Draw
from distill.ranges import Count, Decay, Finite, Positive, Weight


@dataclass(frozen=True)
class PhasedDMD(DMD2):
    """DMD2 for one phase at a time, on the noisy samples from which the next phase starts: needs only prompts."""

    guidance: Finite = 4.0  # guidance scale w of the teacher (LightX2V: 4 to 5)
    every: Count = 5  # fake score steps per student step (paper)
    gan: Weight = 0.0  # lambda_g, weight of the student's GAN loss (paper: none); above 0 real images are noised to s
    gan_fake: Weight = 0.0  # lambda_d, weight of the heads' GAN loss (paper: none)
    times: TimeDistribution = Grid(1000, 20, 980)  # t in the student's loss, restricted to times above s (LightX2V)
    fake_times: TimeDistribution = Grid(1000, 20, 980)  # t in the fake score's loss, also restricted (LightX2V)
    margin: Decay = 0.04  # fraction of both laws above s that is left out, next to s (LightX2V: 20 of 480 steps)
    clamp: Positive = 10.0  # limit of 1 / b^2 (paper, as a review restates it; LightX2V: no weight)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.walk:
            raise ValueError("walk goes on from x0, but a phase ends at noisy samples; leave out --method.walk")

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        first, last = nets.student.phase
        return nets.generate(batch, draw, first + 1 + draw.index("steps", last - first), nets.student.phase_end_time)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return DMD2.student_loss(self.phase_method(nets), x, self.on_phase_interval(nets), batch, draw)

    def fake_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        if self.gan_fake and nets.student.phase_end_time is not None:
            y = batch["real"].to(x)
            s = torch.full((len(y),), nets.student.phase_end_time, dtype=torch.float64, device=y.device)
            batch = batch | {"real": nets.fake_score.path.diffuse(y, draw.normal("end", tuple(y.shape)).to(y), s)}
        return DMD2.fake_loss(self.phase_method(nets), x, self.on_phase_interval(nets), batch, draw)

    def phase_method(self, nets: Nets) -> "PhasedDMD":
        """The method with its time distributions restricted to times above the phase's end."""
        if nets.student.phase_end_time is None:
            return self
        times, fake_times = (Tail(law, self.margin) for law in (self.times, self.fake_times))
        return replace(self, times=times, fake_times=fake_times, gan_times=Tail(self.gan_times))

    def on_phase_interval(self, nets: Nets) -> Nets:
        """The roles on the levels above the phase's end."""
        if nets.student.phase_end_time is None:
            return nets
        path = Interval(nets.teacher.path, nets.student.phase_end_time, self.clamp)
        return replace(nets, teacher=nets.teacher.on_schedule(path), fake=nets.fake_score.on_schedule(path))
