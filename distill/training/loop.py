"""The co-training loop. An update defines which parameters move, under which loss and how often.

Gradients are averaged over processes by one bucketed all-reduce after a player's micro-batches. Nothing depends on
hooks of a wrapper: a player may call its networks any number of times, tap features, stop early or differentiate
forward, and accumulation needs no special case.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill import sharding
from distill.method import Logs, Method, Update
from distill.random import Draw
from distill.roles import Batch, Nets
from distill.training import precision
from distill.training.config import TrainConfig
from distill.training.memory import MemoryGuard, MicroBatchError, OutOfMemory, Snapshot, smaller_micro_batch
from distill.training.nonfinite import handle_nonfinite_update
from distill.training.prepare import prepare_state
from distill.training.samples import MicroBatch, SampleSource, describe_samples
from distill.training.state import State
from distill.training.step import average, clip, count_updates, is_due, reserve_bucket, set_trainable

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(
    method: Method,
    nets: Nets,
    data: Callable[[Draw], Batch],
    cfg: TrainConfig,
    accelerator: Accelerator,
    resume: Path | None = None,
    draw: Callable[..., Draw] = Draw,
    adaptive: bool | None = None,
) -> Iterator[State]:
    """Co-train the players of `method`. Yields the state after every step until `cfg.max_train_steps`.

    A finished run that is resumed yields its state once. data(draw) -> batch with "c" and what the method requires.
    resume: a checkpoint folder to continue from, bit for bit. draw: source of random numbers, called as draw(seed,
    step, player, samples [B]); tests replace it.
    adaptive: halve the micro-batch while memory runs out in the first iteration, at the same global batch. None: if cfg
    gives no gradient_accumulation_steps. Never for sharded networks, whose processes communicate inside them.
    """
    state = prepare_state(nets, data, cfg, accelerator, resume, draw)
    adaptive = cfg.gradient_accumulation_steps is None if adaptive is None else adaptive
    trainer = Trainer(method, state, cfg, accelerator, SampleSource(method, nets, data, draw, cfg.seed), adaptive)
    if state.step >= cfg.max_train_steps:
        yield state
    while state.step < cfg.max_train_steps:
        trainer.step()
        yield state


class Trainer:
    """The updates of this process: `step` makes one iteration and changes `state` in place."""

    def __init__(
        self,
        method: Method,
        state: State,
        cfg: TrainConfig,
        accelerator: Accelerator,
        source: SampleSource,
        adaptive: bool,
    ) -> None:
        self.method = method
        self.state = state
        self.cfg = cfg
        self.accelerator = accelerator
        self.source = source
        self.players = {name: optimizer.param_groups[0]["params"] for name, optimizer in state.optimizers.items()}
        communicates = accelerator.num_processes > 1 and method.communicates
        sharded = sharding.is_fsdp_launch(accelerator)
        self.guard = MemoryGuard(accelerator, adaptive and not sharded and not communicates)
        self.split(cfg.micro_batch(accelerator.num_processes))

    def split(self, micro: int) -> None:
        """Divide this process's samples into micro-batches of `micro` samples."""
        share = self.cfg.train_batch_size // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        samples = torch.arange(first, first + share, device=self.accelerator.device)
        self.indices = samples.split(micro)  # indices in the global batch, one tensor per micro-batch
        self.continued: list[MicroBatch] = []  # micro-batches of the last update that continues a generation

    def step(self) -> None:
        """Make all updates that are due at this iteration. The first iteration finds the micro-batch."""
        if self.guard.active:
            before = Snapshot(self.state)
            while reason := self.try_updates():
                before.restore()
                self.halve_micro_batch(reason)
            self.guard.active = False
        else:
            self.make_updates()
        set_trainable(self.players, *self.players)
        self.state.step += 1

    def make_updates(self) -> None:
        self.state.logs = {}
        earlier: list[MicroBatch] = []
        for update in self.method.updates():
            if is_due(update, self.state.step):
                earlier = self.update(update, earlier)

    def try_updates(self) -> str:
        """Make the updates. "", or why memory ran out: then some updates were made, and all must be made anew."""
        try:
            self.make_updates()
        except OutOfMemory as error:
            return str(error)
        return ""

    def halve_micro_batch(self, reason: str) -> None:
        """Go on with a smaller micro-batch on all processes. MicroBatchError if it has one sample already."""
        micro = len(self.indices[0])
        share = micro * len(self.indices)
        smaller = smaller_micro_batch(share, micro)
        if smaller is None:
            raise MicroBatchError(f"memory runs out in the first iteration with one sample in a micro-batch ({reason})")
        self.split(smaller)
        if self.accelerator.is_main_process:
            sys.stderr.write(
                f"memory ran out with {micro} samples in a micro-batch ({reason}): the run goes on with {smaller}, "
                f"{len(self.indices)} times an update; an update still has {self.cfg.train_batch_size} images\n"
            )

    def update(self, update: Update, earlier: list[MicroBatch]) -> list[MicroBatch]:
        """Make one update of a player and return its micro-batches. earlier: the micro-batches of the previous
        update."""
        player = update.player
        state = self.state
        set_trainable(self.players, player)
        batches = self.guard(lambda: self.backward(update, earlier))
        if update.walk:
            self.continued = batches
        average(self.players[player], self.accelerator)
        norm = clip(self.players[player], self.cfg.norm(player))
        state.logs[f"{player}/grad_norm"] = norm
        if torch.isfinite(norm):
            self.guard(lambda: self.apply(player, norm))
            self.after_step(player)
        else:  # raises unless the update may be skipped
            handle_nonfinite_update(state, self.method, update, batches, self.cfg, self.accelerator)
        return batches

    def backward(self, update: Update, earlier: list[MicroBatch]) -> list[MicroBatch]:
        """Add the gradients of all micro-batches of this process, and return the micro-batches."""
        player = update.player
        batches = []
        for i, indices in enumerate(self.indices):
            with precision.autocast(self.accelerator):
                batch = self.micro_batch(update, i, indices, earlier)
                loss, logs = update.loss(batch.x, self.state.nets, batch.batch, batch.numbers)
            one = 1 + 0 * loss.detach()  # a non-finite loss makes all gradients non-finite, on every process
            (loss / len(self.indices)).backward(one)
            batches.append(batch.detach())
            samples = describe_samples(batch.x) if batch.x.requires_grad else {}
            self.log(player, {"loss": loss} | logs | samples)
        if self.guard.active and self.accelerator.num_processes > 1:
            reserve_bucket(self.players[player])
        return batches

    def micro_batch(self, update: Update, i: int, indices: Tensor, earlier: list[MicroBatch]) -> MicroBatch:
        """The samples of micro-batch i: new ones, those of an earlier update, or those of a continued generation."""
        step = self.state.step
        player = update.player
        numbers = self.source.draw(self.cfg.seed, step, player, indices)
        if update.reuse and earlier:
            return self.source.reused(earlier[i], numbers)
        if update.walk:
            last = self.continued[i] if self.continued else None
            return self.source.continued(player, numbers, step, indices, last)
        return self.source.new(player, numbers)

    def log(self, player: str, logs: Logs) -> None:
        """Add the logs of a micro-batch to those of the step, which are means over micro-batches."""
        for name, value in logs.items():
            key = f"{player}/{name}"
            share = value.detach() / len(self.indices)
            self.state.logs[key] = self.state.logs.get(key, 0.0) + share

    def apply(self, player: str, norm: Tensor) -> None:
        """Take the optimizer's step with gradients of this norm."""
        cfg = self.cfg
        state = self.state
        optimizer = self.state.optimizers[player]
        limit = cfg.max_grad_value if player == "student" else cfg.fake_max_grad_value
        if limit is not None:
            torch.nn.utils.clip_grad_value_(self.players[player], limit)
        for group in optimizer.param_groups:
            group["lr"] = cfg.rates()[player] * cfg.rate(state.step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.skipped.pop(player, None)
        if cfg.skip_nonfinite:
            state.logs[f"{player}/skipped"] = torch.zeros_like(norm)

    def after_step(self, player: str) -> None:
        """After a step of the student: update the moving average and what the method updates."""
        if player == "student":
            state = self.state
            batch = self.cfg.train_batch_size
            updates = count_updates(self.method, "student", state.step)
            state.ema.update(state.nets.student.denoiser.net, batch, state.step * batch, updates)
            self.method.after_student_step(state.nets)
