"""SUN: an adapter for negative prompts (SpeedUpNet). Chai et al. 2023, arXiv 2312.08887. EXPERIMENTAL: L reconstructed.

    T(c-, c)    = out(x_t, c-) + w ( out(x_t, c) - out(x_t, c-) )            the teacher, guided away from c-
    L_cfg       = | out_phi(x_t, c, c-) - sg T(c-, c) |^2                    one pass for two, in the network's space
    Phi(x_t; s) = alpha_s x0 + sigma_s eps of one call, x0 at s = 0          a step of DDIM
    L_msc       = | Phi_phi(x_t; s) - sg Phi_T^k(x_t; s) |^2                 t, s: neighbours of the student's times;
                + | Phi_phi(x_t; s) - sg Phi_phi(Phi_phi(x_t; u); s) |^2     T takes k equal steps; u = (t + s) / 2
    L           = L_cfg + lambda L_msc;  means over all elements

x is real, c its caption. c- is the caption of another sample of the micro-batch, or sometimes the null condition. Only
the adapter phi (negative_attention.py) is trained, --student.negative: without a negative prompt the student is the
teacher. It gets the tokens of c-, not its pooled embedding (SDXL). The adapter is that of the authors' code except for
its initial values. The losses follow their description. The weights, k and the null conditions are ours. Gradients flow
through out_phi and Phi_phi on the left. Not for the digits, whose labels no cross-attention reads.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.diffusion.denoiser import Condition
from distill.diffusion.guidance import CFG, drop
from distill.diffusion.solver import ddim_from_prediction
from distill.diffusion.times import Grid, TimeDistribution
from distill.losses import Reduction, reduce
from distill.method import Batch, ImageMethod, Logs, Nets, Requirement
from distill.networks.negative_attention import shuffled_conditions, with_negative_prompt
from distill.random import Draw
from distill.ranges import Calls, Finite, UnitInterval, Weight


@dataclass(frozen=True)
class SUN(ImageMethod):
    """Guidance with negative prompts in one pass, and few steps, by an adapter of the cross-attention: needs images."""

    guidance: Finite = 7.5  # guidance scale w (SD 1.5's)
    msc: Weight = 1.0  # lambda, weight of L_msc (ours)
    k: Calls = 6  # teacher steps per student step (ours: 24 in four, as the paper's 25 of DPM-Solver++)
    p_null: UnitInterval = 0.1  # fraction of null conditions as c- (ours: pipelines' default negative prompt)
    times: TimeDistribution = Grid(1000, 0, 999)  # distribution of t in L_cfg
    reduction: Reduction = "mean"

    requirements = (Requirement.REAL, Requirement.NULL_CONDITION, Requirement.NEGATIVE_ADAPTER)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        c = batch["real_c"]
        other = drop(shuffled_conditions(c, draw), nets.teacher.null, draw.uniform("null", (len(x),)) < self.p_null)
        teacher = CFG(replace(nets.teacher, null={k: other[k] for k in nets.teacher.null or {}}), self.guidance)
        x_t, t, _ = self.times.diffuse(x, nets.teacher.path, draw)
        told = with_negative_prompt(c, other)
        with torch.no_grad():
            target = teacher(x_t, t, c).out
        loss = reduce((nets.student.denoiser(x_t, t, told).out - target) ** 2, self.reduction)
        logs = {"cfg": loss.detach()}
        if self.msc:
            logs["many"], logs["two"] = self.consistency(x, nets, teacher, c, told, draw)
            loss = loss + self.msc * (logs["many"] + logs["two"])
        return loss, logs

    def consistency(
        self, x: Tensor, nets: Nets, teacher: CFG, c: Condition, told: Condition, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        times = torch.tensor([*nets.student.times, 0.0], dtype=torch.float64, device=x.device)
        i = draw.integers("step", len(times) - 1)
        t = times[i]
        s = times[i + 1]
        student = nets.student.denoiser
        path = nets.teacher.path
        x_t = path.diffuse(x, draw.normal("eps_msc", x.shape).to(x), t)
        u = (t + s) / 2
        pred = student(x_t, t, told)
        with torch.no_grad():
            many = ddim_steps(teacher, x_t, t, s, c, self.k)
            two = ddim_from_prediction(student(ddim_from_prediction(pred, path, u), u, told), path, s)
        one = ddim_from_prediction(pred, path, s)
        return reduce((one - many) ** 2, self.reduction), reduce((one - two) ** 2, self.reduction)


def ddim_steps(net: CFG, x: Tensor, t: Tensor, s: Tensor, c: Condition, steps: int) -> Tensor:
    """x_t -> x_s by `steps` equal steps of DDIM. The last one may end at x0."""
    for j in range(steps):
        x = ddim_from_prediction(net(x, t + (s - t) * j / steps, c), net.path, t + (s - t) * (j + 1) / steps)
    return x
