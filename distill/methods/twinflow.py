"""TwinFlow: one-step generation on large models with self-adversarial flows. Cheng et al. 2025, arXiv 2512.05150.

    x      = G(z, c) in one call;   x_t = (1 - t) x + t eps, with a t and eps of its own in each loss
    L_twin = d( F(x_t, t, -t), eps - x )                    F under the negative sign learns the student's own samples
    g      = clamp( F(x_t, t, -t) - F(x_t, t, t), +-1 )     the velocity of samples less that of data, without gradient
    L_rect = d( F(z, 1, 0), sg( F(z, 1, 0) - g ) ) = d( x, sg(x + g) )
    L      = L_base + lambda_twin L_twin + lambda_rect L_rect       d: Barron's loss of the base, mean over the batch

F is one network: no teacher, no fake score, no discriminator. L_base is RCGM's (distill/methods/rcgm.py), its target an
average. g = (D_data - D_samples)(x_t) / t, so L_rect descends as DMD does. The second time carries the sign. The
authors split a batch in four, three parts for L_base and one for L_twin, and add the mean over the four and .5 L_rect:
3/4 of this sum. Here each loss has the whole batch. Gradients flow through F and, in L_rect, through x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.end_time import PATH, average
from distill.method import Batch, Logs, Nets
from distill.methods.rcgm import RCGM
from distill.random import Draw
from distill.ranges import Weight


@dataclass(frozen=True)
class TwinFlow(RCGM):
    """RCGM and its twin: needs images (or samples of the teacher)."""

    twin: Weight = 1 / 3  # lambda_twin (code: 1/4, beside 3/4 of the base)
    rectify: Weight = 2 / 3  # lambda_rect: 2/3 SD3.5, Qwen-Image; 1 OpenUni (code: .5 and .75 beside these)

    @property
    def base_only(self) -> bool:
        return not (self.twin or self.rectify)

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return batch["real"] if self.base_only else nets.generate(batch, draw, 1)

    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        loss, logs = super().student_loss(batch["real"], nets, batch, draw)
        if self.base_only:
            return loss, logs
        logs["base"] = loss
        net = nets.student.denoiser.on_schedule(PATH)
        c = batch.get("c")
        if self.twin:
            x_t, t, eps = self.times.diffuse(x.detach(), PATH, draw, "_twin")
            F = average(net, x_t, t, -t, c)
            logs["twin"] = self.distance(F, F - (eps - x)).mean()
            loss = loss + self.twin * logs["twin"]
        if self.rectify:
            with torch.no_grad():
                x_u, u, _ = self.times.diffuse(x, PATH, draw, "_rectify")
                g = average(net, x_u, u, -u, c) - average(net, x_u, u, u, c)
            logs["gap"] = g.square().mean()
            logs["rectify"] = self.distance(x, -g.clamp(-self.clamp, self.clamp)).mean()
            loss = loss + self.rectify * logs["rectify"]
        return loss, logs
