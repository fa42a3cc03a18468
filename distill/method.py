"""The base class of methods: the updates of the players, their losses, and the samples that the losses use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

from torch import Tensor

from distill.diffusion.denoiser import Taps
from distill.diffusion.schedule import Schedule
from distill.diffusion.transition import Renoise
from distill.random import Draw
from distill.roles import Batch, Nets

Logs = dict[str, Tensor]
Loss = Callable[[Tensor, Nets, Batch, Draw], tuple[Tensor, Logs]]


class Requirement(Enum):
    """What a method requires beside a teacher and its conditions. The README's table shows the value.

    `check` of the data's configuration checks REAL, PAIRS and FORGOTTEN_PROMPTS. training/requirements.py checks what
    concerns the networks. The recipe attaches the rest to the networks (pipelines/run.py).
    """

    REAL = "images"  # a batch has images "real" [B, *shape] and their condition "real_c"
    PAIRS = "pairs of the teacher (`python -m pipelines.pairs`)"  # a batch has noise "z", the teacher's sample "y"
    FORGOTTEN_PROMPTS = "prompts to forget"  # a batch has the condition "forget_c"
    END_TIME = "a second time of the student (added)"  # the student takes one, see diffusion/end_time.py
    NULL_CONDITION = "a null condition"  # the teacher has one
    GUIDANCE_EMBEDDING = "a network that is told its guidance"
    CROSS_ATTENTION = "cross-attention"
    NEGATIVE_ADAPTER = "cross-attention (adapters are added)"  # student.negative, networks/negative_attention.py
    SEVERAL_CALLS = "several calls with fresh noise"  # the student makes them
    EXPORTED_TEACHER = "a finished student as its teacher"  # the student is called at the teacher's own times
    PERCEPTUAL_DISTANCE = "LPIPS"  # the recipe sets nets.perceptual
    REWARD = "a reward"  # the recipe sets nets.reward
    CONTROL_PICTURE = "a picture of its samples (`pipelines/inference/controlnet.py`)"  # the recipe sets nets.control

    @classmethod
    def select(cls, **conditions: object) -> tuple[Requirement, ...]:
        """The requirements whose condition is true, in the order of the arguments. KeyError for an unknown name."""
        return tuple(cls[name] for name, condition in conditions.items() if condition)


def guidance_requirements(
    w: float | tuple[float, float], solver: str = "ddim", embed: bool = True
) -> tuple[Requirement, ...]:
    """Requirements of guidance w: a null condition if w is not 1; a guidance embedding for a range with `embed`."""
    guided = w != 1 or solver == "cfg++"
    return Requirement.select(NULL_CONDITION=guided, GUIDANCE_EMBEDDING=guided and embed and isinstance(w, tuple))


@dataclass(frozen=True)
class Update:
    """One optimizer step of `player` under `loss`, every `every` iterations from iteration `start` on.

    player: "student" trains the student and a learned weight; "fake" trains those of fake score, discriminator and
    proxy that exist.
    reuse: the loss takes the detached samples of an earlier update of the same iteration, if there was one.
    walk: reuse one multi-step generation across iterations. Iteration k uses its sample after k calls, so that each
    iteration costs one student call. It restarts when the student is updated or all calls are made. Draw.late counts
    the iterations since the restart.
    alone: until this iteration, the update is made at every iteration; the other updates start later.
    """

    player: Literal["student", "fake"]
    loss: Loss
    every: int = 1
    reuse: bool = False
    walk: bool = False
    start: int = 0
    alone: int = 0


@dataclass(frozen=True)
class FeatureTaps:
    """The features that the heads of a role take, and the type of the heads.

    modules: submodules of the fake score or of the teacher, one head for each. places: a head gives a logit for every
    position of its feature map or every token; else it gives their mean. pixels: use the heads of PCM.
    """

    modules: Taps
    places: bool = False
    pixels: bool = False


class Method(ABC):
    """A distillation method. A subclass is a frozen dataclass of the method's hyper-parameters."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of Nets that the method trains or averages, beside teacher and student."""
        return ()

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """What the method requires beside a teacher and its conditions."""
        return ()

    @property
    def feature_taps(self) -> dict[str, FeatureTaps]:
        """The features that the heads take, by role ("disc", "proxy")."""
        return {}

    @property
    def noises(self) -> tuple[Renoise, ...] | None:
        """The values of student.renoise with which the student can make several calls; None: all.

        A student of one call may have any value: `on_build` refuses those that the losses cannot use.
        """
        return None

    @property
    def jumps(self) -> bool:
        """Whether the student's end time is the time of its next call (Student.jumps)."""
        return False

    @property
    def communicates(self) -> bool:
        """Whether a loss exchanges numbers between processes, so that no process may stop inside it."""
        return False

    @property
    def degradation_run(self) -> Path | None:
        """The folder of the run whose checkpoints are the role "past"; None: the method has no such role."""
        return None

    @abstractmethod
    def updates(self) -> list[Update]:
        """The updates of one iteration, in order."""

    @abstractmethod
    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        """The samples x [B, *shape] that the loss of draw.player takes, with gradient to the student.

        For the player "fake" they have no gradient. A name of `draw` gives the same numbers here and in the loss,
        unless the update has `reuse` or `walk`: a loss that needs more than x, such as its time, computes it again.
        """

    def call_times(self, steps: int, first: float, schedule: Schedule) -> tuple[float, ...] | None:
        """Times of a student of `steps` calls, the first at `first`; None: the times of the exported scheduler."""
        return None

    def on_build(self, nets: Nets) -> None:  # noqa: B027
        """Called once after all networks are built, to check the student's calls or to add buffers to a network."""

    def after_student_step(self, nets: Nets) -> None:  # noqa: B027
        """Called after every optimizer step of the student."""


class ImageMethod(Method):
    """A method with one loss, the student's, whose samples are the real images of the batch."""

    def updates(self) -> list[Update]:
        return [Update("student", self.student_loss)]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return batch["real"]

    @abstractmethod
    def student_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        """The loss of images x [B, *shape] and its logs."""


class ConsistencyMethod(ImageMethod):
    """A method whose student maps every noise level to data, so that several calls need new noise between them."""

    @property
    def noises(self) -> tuple[Renoise, ...] | None:
        return ("fresh",)
