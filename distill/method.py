"""What a method is: the updates of its players, their losses, and the samples that they see."""

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
    """What a method requires beside a teacher and its conditions. The value stands in the README's table.

    `check` of the data's configuration looks at REAL, PAIRS and FORGOTTEN_PROMPTS, training/requirements.py at what
    concerns the networks; the recipe attaches the others to the networks (pipelines/run.py).
    """

    REAL = "images"  # a batch has "real" [B, *shape] and their condition "real_c"
    PAIRS = "pairs of the teacher (`python -m pipelines.pairs`)"  # a batch has noise "z" and the teacher's sample "y"
    FORGOTTEN_PROMPTS = "prompts to forget"  # a batch has "forget_c"
    END_TIME = "a second time of the student (added)"  # see diffusion/end_time.py
    NULL_CONDITION = "a null condition"  # of the teacher
    GUIDANCE_EMBEDDING = "a network that is told its guidance"
    CROSS_ATTENTION = "cross-attention"
    NEGATIVE_ADAPTER = "cross-attention (adapters are added)"  # student.negative, see networks/negative_attention.py
    SEVERAL_CALLS = "several calls with fresh noise"  # of the student
    EXPORTED_TEACHER = "a finished student as its teacher"  # the student is called at the teacher's own times
    PERCEPTUAL_DISTANCE = "LPIPS"  # nets.perceptual
    REWARD = "a reward"  # nets.reward
    CONTROL_PICTURE = "a picture of its samples (`pipelines/inference/controlnet.py`)"  # nets.control

    @classmethod
    def select(cls, **conditions: object) -> tuple[Requirement, ...]:
        """The requirements whose condition is true, in the order of the arguments. KeyError for an unknown name."""
        return tuple(cls[name] for name, condition in conditions.items() if condition)


def guidance_requirements(
    w: float | tuple[float, float], solver: str = "ddim", embed: bool = True
) -> tuple[Requirement, ...]:
    """Requirements of guidance w: a null condition if w is not 1, and for a range with `embed` a guidance embedding."""
    guided = w != 1 or solver == "cfg++"
    return Requirement.select(NULL_CONDITION=guided, GUIDANCE_EMBEDDING=guided and embed and isinstance(w, tuple))


@dataclass(frozen=True)
class Update:
    """`player` ("student", with a learned weight; "fake": fake score, discriminator, proxy, or several of them) moves
    under `loss` every `every` steps from `start` on.

    reuse: on the detached samples of an earlier update of the same step, where there was one, instead of fresh ones.
    walk: fresh samples of successive steps are those after 1, 2, ... calls of one generation, until the student moves
    or has no more calls: Draw.late is how many steps ago it began, and a step costs one call.
    alone: before this step it moves at each one, the others having not begun.
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
    """What the heads of a role read, and which heads they are.

    modules: of the fake score or the teacher, a head each. places: a head keeps a logit for every place of its map or
    every token; else it gives their mean. pixels: the heads are PCM's.
    """

    modules: Taps
    places: bool = False
    pixels: bool = False


class Method(ABC):
    """An algorithm. A subclass is a frozen dataclass of its hyper-parameters."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of Nets that it trains or averages, beside teacher and student."""
        return ()

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """What it requires beside a teacher and its conditions."""
        return ()

    @property
    def feature_taps(self) -> dict[str, FeatureTaps]:
        """What the heads read, by role: "disc", "proxy"."""
        return {}

    @property
    def noises(self) -> tuple[Renoise, ...] | None:
        """The values of student.renoise with which its student can make several calls; None: all."""
        return None

    @property
    def jumps(self) -> bool:
        """Whether the student's end time is the time to which x goes (Student.jumps)."""
        return False

    @property
    def degradation_run(self) -> Path | None:
        """The folder of the run whose checkpoints are the role "past"."""
        return None

    @abstractmethod
    def updates(self) -> list[Update]:
        """The updates of an iteration, in order."""

    @abstractmethod
    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        """The samples x [B, *shape] that the loss of draw.player looks at, with gradient for the student."""

    def call_times(self, steps: int, first: float, schedule: Schedule) -> tuple[float, ...] | None:
        """The times of a student of `steps` calls from the time `first` on; None: those of the exported scheduler."""
        return None

    def on_build(self, nets: Nets) -> None:  # noqa: B027
        """Called once all networks are built: checks the student's calls, or adds buffers to a network."""

    def after_student_step(self, nets: Nets) -> None:  # noqa: B027
        """Called after every optimizer step of the student."""


class ToData(Method):
    """A method whose student leads from every level to data: several calls need fresh noise between them."""

    @property
    def noises(self) -> tuple[Renoise, ...] | None:
        return ("fresh",)
