"""PSO: Pairwise Sample Optimization. Miao et al. 2024, arXiv 2410.03190.

Online, on its own samples; pso_offline.py trains on data. The teacher is a finished student of N calls, and the student
starts as its copy. Its walk, for i < N, is

    x_{i+1} ~ N( alpha_{i+1} D(x_i, t_i), sigma_{i+1}^2 ),     and then x = D(x_N, t_N) without noise
    h_i(x)  = mean over elements of  log p_student(x_{i+1} | x_i) - log p_teacher(x_{i+1} | x_i)
            = mean of (m - m_teacher) ( x_{i+1} - (m + m_teacher) / 2 ) / sigma_{i+1}^2,    m = alpha_{i+1} D(x_i, t_i)
    r_i     = clip( exp h_i, 1 - eps, 1 + eps )                no gradient where it is clipped; its fraction is logged
    L       = - log sigmoid( beta sign( R(x) - R(y) ) ( log r_i(x) - log r_i(y) ) )

of two walks x and y under one condition, each with its own noise; means over i < N and the batch. Gradients flow only
through m, one call at a time. The walks and the reward R have no gradient, so R may be any preference.
"""

from dataclasses import dataclass
from math import log1p

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.diffusion.denoiser import Condition
from distill.diffusion.guidance import repeat_condition
from distill.method import Batch, Logs, Method, Nets, Requirement, Update
from distill.methods.wrappers.reward import judge
from distill.random import Draw
from distill.ranges import Decay, Positive


@dataclass(frozen=True)
class PSO(Method):
    """Preference training of a finished student of several calls, by a reward on its samples: needs only prompts."""

    beta: Positive = 50.0  # SDXL DMD2 (code); h is a mean over elements, so beta is large
    eps: Decay = 0.1  # width of the clip (code)
    reward: str = (
        "openai/clip-vit-base-patch32"  # R: folder or Hub name of a CLIP; "labels": pipelines/judges/reward.py
    )
    reward_decoder: str | None = None  # decoder for R: folder or Hub name of an AutoencoderTiny; None: the teacher's

    requirements = (Requirement.EXPORTED_TEACHER, Requirement.SEVERAL_CALLS, Requirement.REWARD)

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss)]

    @torch.no_grad()
    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:  # [B, 2, N + 1, ...]
        pair = [nets.trajectory(batch, numbers) for numbers in (draw, draw.independent_stream("second"))]
        return torch.stack([torch.stack(walk, 1) for walk in pair], 1)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        c = repeat_condition(batch.get("c"), 2)
        walks = x.transpose(0, 1).flatten(0, 1)  # [2 B, N + 1, ...]: all x, then all y
        with torch.no_grad():
            reward = torch.cat([judge(nets)(walk, batch.get("c")) for walk in walks[:, -1].chunk(2)])
        h = torch.stack([self.h(walks, i, c, nets) for i in range(x.shape[2] - 2)])
        log_r = h.clamp(log1p(-self.eps), log1p(self.eps))  # [N - 1, 2 B]
        gap = lambda of: of.chunk(2, -1)[0] - of.chunk(2, -1)[1]
        margin = gap(reward).sign() * gap(log_r)
        logs = {"reward": reward.mean(), "margin": margin.mean(), "clipped": (h != log_r).float().mean()}
        return F.softplus(-self.beta * margin).mean(), logs

    def h(self, walk: Tensor, i: int, c: Condition, nets: Nets) -> Tensor:  # [B, N + 1, ...] -> [B]
        x = walk[:, i]
        y = walk[:, i + 1]
        m, sigma = nets.student.step(x, i, c)
        with torch.no_grad():
            base, _ = nets.reference_student.step(x, i, c)
        return ((m - base) * (y - (m + base) / 2) / sigma**2).flatten(1).mean(1)
