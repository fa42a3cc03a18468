"""NASA-T: negative prompts in training, around any score distillation. SNOOPI, Nguyen et al. 2024, arXiv 2412.02687.

    x      = G(z, c, c-),  every cross-attention of G gives z - a z-,  a ~ U(0, alpha) per step           NASA
    real^k = real(x_t, c-) + k ( real(x_t, c) - real(x_t, c-) )         the teacher's guidance is away from c-
    fake^k = fake(x_t, 0)  + k ( fake(x_t, c) - fake(x_t, 0) )          the fake score does not get c-
    L      = L_base of these

c- is the prompt of another sample of the micro-batch; the paper has a list of 10,000 negative prompts. The student has
no new weights: it is exported as usual, and pipelines/inference has NASA for it. Gradients flow as in the base, and
through both attentions.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from distill.method import Batch, Logs, Loss, Method, Nets, Requirement
from distill.methods.vsd import VSD
from distill.methods.wrappers.wrapper import MethodWrapper
from distill.networks.negative_attention import (
    NASA,
    TEXT,
    install_negative_rule,
    shuffled_conditions,
    with_negative_prompt,
)
from distill.random import Draw
from distill.ranges import UnitInterval


@dataclass(frozen=True)
class NASAT(MethodWrapper):
    """A score distillation whose student learns to turn away from negative prompts."""

    base: Method = VSD()  # the wrapped method: PG-SB (paper)
    alpha: UnitInterval = 1.0  # upper limit of a (paper: 1); 0: the base

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return self.base.requirements + Requirement.select(CROSS_ATTENTION=self.alpha)

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        if self.alpha:
            c = batch["c"]
            a = self.alpha * draw.index("nasa", 1 << 20) / (1 << 20)
            install_negative_rule(nets.student.denoiser.net, NASA(a), c[TEXT[0]].shape[1])
            batch = batch | {"c": with_negative_prompt(c, shuffled_conditions(c, draw))}
        return self.base.sample(nets, batch, draw)

    def student_term(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        if self.alpha and (null := nets.teacher.null):
            other = shuffled_conditions(batch["c"], draw)
            nets = replace(nets, teacher=replace(nets.teacher, null={key: other[key] for key in null}))
        return loss(x, nets, batch, draw)
