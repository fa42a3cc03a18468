"""A method around another: it changes the networks or the losses that its base sees, and is the base in all else."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from distill.method import Batch, Logs, Loss, Nets, Requirement, Update
from distill.methods.sid import SiD
from distill.random import Draw

Term = Callable[[Loss, Tensor, Nets, Batch, Draw], tuple[Tensor, Logs]]


@dataclass(frozen=True)
class Wrapped:
    """`base` with the loss of each player exchanged for `self.PLAYER_term(loss of the base, x, nets, batch, draw)`.

    Wrappers go around wrappers: Rewarded(Forgetting(SiD())). The fields of the base are --method.base.NAME.
    """

    base: Any = SiD()  # the method: any

    def __getattr__(self, name: str) -> Any:  # taps, places, after and the like, where the base has them
        if name == "base" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def roles(self) -> tuple[str, ...]:
        return self.base.roles

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return self.base.requirements

    def updates(self) -> list[Update]:
        def around(update: Update) -> Update:
            term: Term = getattr(self, f"{update.player}_term")
            return replace(update, loss=lambda *turn: term(update.loss, *turn))

        return [around(update) for update in self.base.updates()]

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        return self.base.sample(nets, batch, draw)

    def student_term(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return loss(x, nets, batch, draw)

    def fake_term(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return loss(x, nets, batch, draw)
