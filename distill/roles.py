"""The networks of a distillation by role: teacher, student, fake score, discriminator, target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.guidance import WorseModelGuided
from distill.diffusion.student import Student
from distill.networks.ema import move_towards
from distill.random import Draw

T = TypeVar("T")
Batch = dict[str, Any]
HEAD_ROLES = ("disc", "proxy")  # roles that are heads over features (Method.feature_taps)
SMALL = {"disc": "fake", "proxy": "fake", "weight": "student"}  # roles other than denoisers, and their players


@dataclass(eq=False)
class CheckpointedDenoiser:
    """One network that can load any of several checkpoints of the role "fake". It holds the one requested last.

    backbone: a network whose tensors it may share and never writes to. fill: checkpoint.load_initial_weights.
    """

    denoiser: Denoiser
    folders: tuple[Path, ...]
    backbone: nn.Module
    fill: Callable[[nn.Module, Path, str, nn.Module], None]
    at: int | None = None

    def __call__(self, i: int) -> Denoiser:
        if i != self.at:
            self.fill(self.denoiser.net, self.folders[i], "fake", self.backbone)
            self.at = i
        return self.denoiser


@dataclass(eq=False)
class Nets:
    """The networks of a run by role. A role that a method does not use is None.

    shape: shape of one sample, for example (C, H, W).
    disc: heads of the discriminator, over features of the fake score or the teacher; the player "fake" trains them.
    proxy: heads of the reward's proxy, over the same kind of features; the player "fake" trains them.
    weight: learned weight of the student's loss (adaptive_weight.py); the player "student" trains it.
    past: checkpoints of the teacher's degradation towards the student (DisBack).
    perceptual: distance [B] of decoded samples [B, *shape] from others, with gradient.
    reward: reward [B] of samples [B, *shape] under a condition, with gradient to the samples.
    control: control image [B, C, H, W] of samples [B, *shape], which a student receives as c["control"].
    perceptual, reward and control are set only for methods that require them.
    """

    teacher: Denoiser
    student: Student
    shape: tuple[int, ...]
    fake: Denoiser | None = None
    disc: nn.Module | None = None
    proxy: nn.Module | None = None
    weight: nn.Module | None = None
    target: Denoiser | None = None
    past: CheckpointedDenoiser | None = None
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    reward: Callable[[Tensor, Condition], Tensor] | None = None
    control: Callable[[Tensor], Tensor] | None = None

    @property
    def fake_score(self) -> Denoiser:
        """The fake score; ValueError if the method has none."""
        return _require(self.fake, "fake")

    @property
    def discriminator(self) -> nn.Module:
        """The heads of the discriminator; ValueError if the method has none."""
        return _require(self.disc, "disc")

    @property
    def reward_proxy(self) -> nn.Module:
        """The heads of the reward's proxy; ValueError if the method has none."""
        return _require(self.proxy, "proxy")

    def modules(self) -> dict[str, nn.Module]:
        """Every trained or averaged network by role. The frozen teacher is not among them."""
        fake = {} if self.fake is None else {"fake": self.fake.net}
        small = {role: getattr(self, role) for role in SMALL if getattr(self, role) is not None}
        target = {} if self.target is None else {"target": self.target.net}
        return {"student": self.student.denoiser.net, **fake, **small, **target}

    def frozen(self) -> dict[str, nn.Module]:
        """Networks that no player trains: the teacher, the worse network of its guidance, its past checkpoints, and the
        experts of the student's earlier phases."""
        experts = {f"expert {i}": expert.net for i, expert in enumerate(self.student.experts)}
        past = {} if self.past is None else {"past": self.past.denoiser.net}
        worse = {"worse": self.teacher.worse} if isinstance(self.teacher, WorseModelGuided) else {}
        return {"teacher": self.teacher.net, **worse, **past, **experts}

    @property
    def reference_student(self) -> Student:
        """The teacher wrapped as a Student: the reference policy when an exported student is fine-tuned."""
        return replace(self.student, denoiser=self.teacher)

    def update_target(self, mu: float) -> None:
        """target <- mu target + (1 - mu) student, if the method has a target."""
        if self.target is not None:
            move_towards(self.target.net, self.student.denoiser.net, mu)

    def generate(self, batch: Batch, draw: Draw, steps: int | None = None, to: float | None = None) -> Tensor:
        """One sample of the student for every index of `draw`, from the noise "z" and the condition of the batch."""
        z = draw.normal("z", (len(draw.samples), *self.shape))
        return self.student.generate(z, batch.get("c"), draw, steps, to)

    def trajectory(self, batch: Batch, draw: Draw) -> list[Tensor]:
        """Every x of the generation of that sample, then the sample (Student.trajectory)."""
        return self.student.trajectory(draw.normal("z", (len(draw.samples), *self.shape)), batch.get("c"), draw)


def _require(role: T | None, name: str) -> T:
    if role is None:
        raise ValueError(f"the networks have no role {name!r}: name it in the method's `roles`, and build them anew")
    return role
