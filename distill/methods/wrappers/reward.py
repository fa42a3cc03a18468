"""RewardGuided: any method and a reward. SwiftBrush v2, Dao et al. 2024, arXiv 2408.14176; RG-LCD, 2403.11027.

    L_student = L_base + w_n mean_i d( R(x_i, c_i) )        d(r) = max(0, tau - r) per sample, or -r without tau
    w_n       = w ( 1 - n / N )+                            falls to 0 over N steps, or stays w
    R(x, c)   = cos( CLIP of the decoded x, CLIP of the prompt )                      nets.reward, judges/reward.py

x is the base's sample. If the base has samples of data (LCD, sCM), x is the student's prediction with gradient under
the condition of that call. The clamp is per sample, not on the mean, so that one sample's excess cannot hide another's
deficit. The gradient flows through the frozen decoder and the reward to x. The fake score's loss is the base's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.schedule import Prediction
from distill.method import Batch, Logs, Loss, Nets, Requirement
from distill.methods.wrappers.wrapper import MethodWrapper
from distill.random import Draw
from distill.ranges import Count, Finite, Weight


@dataclass(frozen=True)
class RewardGuided(MethodWrapper):
    """A method with a reward on its student's samples."""

    weight: Weight = 0.1  # w, on the mean over the batch (SwiftBrush v2: .1; its base's loss is a mean over elements)
    clamp: Finite | None = 0.35  # tau (SwiftBrush v2: .35; SNOOPI: .37); None: -R (RG-LCD)
    until: Count | None = None  # N, steps until w is 0 (SwiftBrush v2: the whole run); None: w is constant
    reward: str = (
        "openai/clip-vit-base-patch32"  # R: folder or Hub name of a CLIP; "labels": pipelines/judges/reward.py
    )
    reward_decoder: str | None = None  # folder or Hub name of an AutoencoderTiny (SwiftBrush v2); None: the teacher's

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return self.base.requirements + Requirement.select(REWARD=self.weight)

    def student_term(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        w = self.weight * (1.0 if self.until is None else max(0.0, 1 - draw.step / self.until))
        if not w:
            return loss(x, nets, batch, draw)
        said = [(x, batch.get("c"))] if x.requires_grad else []
        if said:
            total, logs = loss(x, nets, batch, draw)
        else:
            heard = RecordingDenoiser(**vars(nets.student.denoiser), said=said)
            total, logs = loss(x, replace(nets, student=replace(nets.student, denoiser=heard)), batch, draw)
        r = self.score(*said[-1], nets, batch, draw)
        d = -r if self.clamp is None else (self.clamp - r).relu()
        return total + w * d.mean().to(total), logs | {"reward": r.mean()}

    def score(self, x: Tensor, c: Condition, nets: Nets, batch: Batch, draw: Draw) -> Tensor:  # R(x, c) [B]
        return judge(nets)(x, c)


def judge(nets: Nets) -> Callable[[Tensor, Condition], Tensor]:
    """The reward of the networks. ValueError if there is none."""
    if nets.reward is None:
        raise ValueError(
            "no nets.reward (pipelines.judges.reward), which says how good samples are; or set its weight to 0"
        )
    return nets.reward


@dataclass(eq=False)
class RecordingDenoiser(Denoiser):
    """A denoiser that stores every x0 that has a gradient, with its condition."""

    said: list[tuple[Tensor, Condition]] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, c: Condition = None) -> Prediction:
        pred = super().__call__(x, t, c)
        if pred.out.requires_grad:
            self.said.append((pred.x0, c))
        return pred
