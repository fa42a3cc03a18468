"""What a method is: the updates of its players, their losses, and the samples that they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from distill.random import Draw
from distill.roles import Batch, Nets

Logs = dict[str, Tensor]
Loss = Callable[[Tensor, Nets, Batch, Draw], tuple[Tensor, Logs]]


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


class Method(Protocol):
    """An algorithm: a frozen dataclass of its hyper-parameters.

    May define `after(nets)`, called when the student has moved, and `before(nets)` for a state that is to be kept, as
    buffers of a network.

    One with the role "disc" also has `taps`, the modules of the fake score or the teacher that the discriminator reads
    with a head each, and may have `places`: whether each place of a head has a logit, or all have their mean, and
    `pixels`: whether heads are PCM's. It may define `calls(steps, first, schedule)`: the times of a student of so many
    calls from the time `first` on, where none are given; None: those of the scheduler. `noises` are the values of
    student.renoise with which several calls of its student are right, where not all are. One that needs "end" has a
    student that is told a second time (end_time.py), which `jumps` if it is the time to which x goes, "steps" one of
    several calls with fresh noise, and "finished" one that is called as its teacher, an exported student
    (pipelines/export/schedule.py).
    """

    roles: tuple[str, ...]  # of Nets, beside teacher and student
    # of data "real": and "real_c", "pairs": "z", "y", "forget": "forget_c"; guidance "null", "told"; of Nets "reward"
    needs: tuple[str, ...]

    def updates(self) -> list[Update]: ...

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor: ...


class ToData:
    """A method whose student leads from every level to data: several calls need fresh noise between them."""

    noises: ClassVar[tuple[str, ...]] = ("fresh",)
