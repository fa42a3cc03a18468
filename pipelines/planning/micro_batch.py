"""The micro-batch of a run: as large as the memory of a GPU allows, at the same global batch.

The random numbers of a sample do not depend on its micro-batch. Another micro-batch changes sums by rounding alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.planning.memory_plan import Run

if TYPE_CHECKING:
    from pipelines.planning.models import Meta


@dataclass(frozen=True)
class LinearMemory:
    """Memory of one GPU in bytes, as a function of the samples in a micro-batch.

    fixed: what does not depend on the micro-batch. sample: bytes for each sample. limit: bytes that may be used.
    """

    fixed: float
    sample: float
    limit: float = math.inf

    def total(self, micro: int) -> float:
        return self.fixed + micro * self.sample

    def on_top_of(self, state: float, limit: float) -> LinearMemory:
        """These bytes and those of a state."""
        return LinearMemory(self.fixed + state, self.sample, limit)


def choose_micro_batch(global_batch: int, processes: int, memory: LinearMemory) -> int | None:
    """The largest micro-batch of a process that fits and divides its part of the global batch; None: none fits.

    ValueError if the processes cannot share the global batch.
    """
    part, rest = divmod(global_batch, processes)
    if rest or not part:
        raise ValueError(f"train_batch_size {global_batch} is not divisible by {processes} process(es)")
    sizes = [size for size in range(1, part + 1) if part % size == 0]
    return max((size for size in sizes if memory.total(size) <= memory.limit), default=None)


def measure_activations(run: Run) -> LinearMemory:
    """The activations of a run as a function of its micro-batch, from those of two and of three samples.

    A part is fixed: autocast keeps the weights in bfloat16 for the backward pass. One sample alone is not counted: its
    rows are views where those of more are copies.
    """
    two, three = (with_batch(run, size).cost.activations for size in (2, 3))
    return LinearMemory(3 * two - 2 * three, three - two)


def with_batch(run: Run, micro: int) -> Run:
    """The run with one micro-batch of `micro` samples on each GPU, on the same networks. It is counted once."""
    counted: dict[int, Run] = run.__dict__.setdefault("batches", {})
    if micro in counted:
        return counted[micro]
    train = replace(run.config.train, train_batch_size=micro * run.gpus, gradient_accumulation_steps=1)
    counted[micro] = share_networks(run, replace(run, config=replace(run.config, train=train)))
    return counted[micro]


def share_networks(run: Run, other: Run) -> Run:
    """`other` with the networks of `run`, which are those of its own configuration."""
    other.__dict__["networks"] = run.networks
    return other


def with_micro_batch(run: Run, limit: float) -> Run:
    """The run with the largest micro-batch whose memory is at most `limit` bytes, or with one sample if none fits.

    --gradient_accumulation_steps stays if it is given.
    """
    train = run.config.train
    if train.gradient_accumulation_steps is not None:
        return run
    if train.micro_batch(run.gpus) == 1:
        return run
    memory = measure_activations(run).on_top_of(run.state.total, limit)
    micro = choose_micro_batch(train.train_batch_size, run.gpus, memory) or 1
    rounds = train.train_batch_size // run.gpus // micro
    config = replace(run.config, train=replace(train, gradient_accumulation_steps=rounds))
    return share_networks(run, replace(run, config=config))


def find_parts(teacher: str) -> Meta | None:
    """The configs of a teacher: a folder, a published name or a Hub name. None if they are not known here."""
    from pipelines.planning.models import Meta, find_model

    if teacher and Path(teacher).is_dir():
        return Meta.from_folder(Path(teacher))
    try:
        return Meta(find_model(teacher, "teacher"))
    except ValueError:
        return None
