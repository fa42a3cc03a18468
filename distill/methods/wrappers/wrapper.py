"""A method around another method. It changes the networks or losses of its base, and otherwise equals the base."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.diffusion.schedule import Schedule
from distill.diffusion.transition import Renoise
from distill.method import Batch, FeatureTaps, Logs, Loss, Method, Nets, Requirement, Update
from distill.methods.sid import SiD
from distill.random import Draw

Term = Callable[[Loss, Tensor, Nets, Batch, Draw], tuple[Tensor, Logs]]


@dataclass(frozen=True)
class MethodWrapper(Method):
    """`base` with each player's loss replaced by `self.PLAYER_term(loss of the base, x, nets, batch, draw)`.

    Wrappers may be nested: RewardGuided(SFD(SiD())). The fields of the base are --method.base.NAME.
    """

    base: Method = SiD()  # the wrapped method: any

    def __getattr__(self, name: str) -> Any:  # fields of the base
        if name == "base" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def roles(self) -> tuple[str, ...]:
        return self.base.roles

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return self.base.requirements

    @property
    def feature_taps(self) -> dict[str, FeatureTaps]:
        return self.base.feature_taps

    @property
    def noises(self) -> tuple[Renoise, ...] | None:
        return self.base.noises

    @property
    def jumps(self) -> bool:
        return self.base.jumps

    @property
    def communicates(self) -> bool:
        return self.base.communicates

    @property
    def degradation_run(self) -> Path | None:
        return self.base.degradation_run

    def call_times(self, steps: int, first: float, schedule: Schedule) -> tuple[float, ...] | None:
        return self.base.call_times(steps, first, schedule)

    def on_build(self, nets: Nets) -> None:
        self.base.on_build(nets)

    def after_student_step(self, nets: Nets) -> None:
        self.base.after_student_step(nets)

    def updates(self) -> list[Update]:
        def wrap_update(update: Update) -> Update:
            term: Term = getattr(self, f"{update.player}_term")
            return replace(update, loss=lambda *turn: term(update.loss, *turn))

        return [wrap_update(update) for update in self.base.updates()]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return self.base.sample(nets, batch, draw)

    def student_term(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return loss(x, nets, batch, draw)

    def fake_term(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return loss(x, nets, batch, draw)
