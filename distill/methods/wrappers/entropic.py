"""ESD: entropic score distillation. Wang et al. 2023, arXiv 2401.00909; a wrapper of any method with a fake score.

    D_fake^k = D_fake(null) + k ( D_fake(c) - D_fake(null) ),   k = 1 - lambda       in the student's loss alone
    L_fake   = that of the base, with a share p_drop of null conditions

lambda = 0 is the base. KL(student || teacher) of each condition does not reward spread over conditions. lambda times
the entropy of all conditions' samples together does: its gradient is the fake score without a condition. The guidance
is linear in the network's own output. The classifier of a GAN reads the features under c. SiD has its own k (kappa2 =
kappa3), VSD `fake_guidance`: the same numbers.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.guidance import CFG, drop
from distill.diffusion.schedule import Prediction
from distill.method import Batch, Logs, Loss, Nets, Requirement, Taps
from distill.methods.wrappers.wrapper import MethodWrapper
from distill.random import Draw
from distill.ranges import UnitInterval, Weight


@dataclass(frozen=True)
class Entropic(MethodWrapper):
    """A method with a guided fake score: samples of different conditions are kept apart."""

    entropy: Weight = 0.5  # lambda, weight of the entropy (paper); above 1 the samples spread too far
    p_drop: UnitInterval = 0.1  # probability of a null condition for the fake score if lambda is not 0

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return tuple(dict.fromkeys(self.base.requirements + Requirement.select(NULL_CONDITION=self.entropy)))

    def student_term(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        if not self.entropy:
            return loss(x, nets, batch, draw)
        if nets.fake is None:
            raise ValueError(f"{type(self.base).__name__} has no fake score to guide: set entropy to 0")
        total, logs = loss(x, replace(nets, fake=GuidedDenoiser(**vars(nets.fake), k=1 - self.entropy)), batch, draw)
        return total, {name: value for name, value in logs.items() if name != "lag"}  # the fake score is guided here

    def fake_term(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        if self.entropy and nets.fake is not None:  # real images, too: a null condition must not imply generated
            null = nets.fake.null
            mask = draw.uniform("drop", (len(x),)) < self.p_drop
            batch = batch | {key: drop(batch[key], null, mask) for key in ("c", "real_c") if key in batch}
        return loss(x, nets, batch, draw)


@dataclass(eq=False)
class GuidedDenoiser(Denoiser):
    """A denoiser whose predictions have guidance k. Its features are those under c."""

    k: float = 1.0

    def __call__(self, x: Tensor, t: Tensor, c: Condition = None) -> Prediction:
        return CFG(self.unguided, self.k)(x, t, c)

    @property
    def unguided(self) -> Denoiser:
        return Denoiser(**{key: value for key, value in vars(self).items() if key != "k"})

    def predict_with_features(self, x: Tensor, t: Tensor, c: Condition, taps: Taps) -> tuple[Prediction, list[Tensor]]:
        return CFG(self.unguided, self.k).predict_with_features(x, t, c, taps)

    def features(self, x: Tensor, t: Tensor, c: Condition, taps: Taps) -> list[Tensor]:
        return self.unguided.features(x, t, c, taps)
