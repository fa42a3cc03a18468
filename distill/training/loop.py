"""The co-training loop. An update defines which parameters move, under which loss and how often.

Gradients are averaged over processes by one bucketed all-reduce after a player's micro-batches. Nothing depends on
hooks of a wrapper: a player may call its networks any number of times, tap features, stop early or differentiate
forward, and accumulation needs no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.method import Logs, Method, Update
from distill.random import Draw
from distill.roles import Batch, Nets
from distill.training import precision
from distill.training.config import TrainConfig
from distill.training.nonfinite import handle_nonfinite_update
from distill.training.prepare import prepare_state
from distill.training.samples import MicroBatch, SampleSource, describe_samples
from distill.training.state import State
from distill.training.step import average, clip, count_updates, is_due, set_trainable

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
) -> Iterator[State]:
    """Co-train the players of `method`. Yields the state after every step until `cfg.max_train_steps`.

    A finished run that is resumed yields its state once. data(draw) -> batch with "c" and what the method requires.
    resume: a checkpoint folder to continue from, bit for bit. draw: source of random numbers, called as draw(seed,
    step, player, samples [B]); tests replace it.
    """
    state = prepare_state(nets, data, cfg, accelerator, resume, draw)
    trainer = Trainer(method, state, cfg, accelerator, SampleSource(method, nets, data, draw, cfg.seed))
    if state.step >= cfg.max_train_steps:
        yield state
    while state.step < cfg.max_train_steps:
        trainer.step()
        yield state


class Trainer:
    """The updates of this process: `step` makes one iteration and changes `state` in place."""

    def __init__(
        self, method: Method, state: State, cfg: TrainConfig, accelerator: Accelerator, source: SampleSource
    ) -> None:
        self.method = method
        self.state = state
        self.cfg = cfg
        self.accelerator = accelerator
        self.source = source
        self.players = {name: optimizer.param_groups[0]["params"] for name, optimizer in state.optimizers.items()}
        micro = cfg.micro_batch(accelerator.num_processes)
        rounds = cfg.rounds
        first = accelerator.process_index * micro * rounds
        samples = torch.arange(first, first + micro * rounds, device=accelerator.device)
        self.indices = samples.split(micro)  # indices in the global batch, one tensor per micro-batch
        self.continued: list[MicroBatch] = []  # micro-batches of the last update that continues a generation

    def step(self) -> None:
        """Make all updates that are due at this iteration."""
        self.state.logs = {}
        earlier: list[MicroBatch] = []
        for update in self.method.updates():
            if is_due(update, self.state.step):
                earlier = self.update(update, earlier)
        set_trainable(self.players, *self.players)
        self.state.step += 1

    def update(self, update: Update, earlier: list[MicroBatch]) -> list[MicroBatch]:
        """Make one update of a player and return its micro-batches. earlier: the micro-batches of the previous
        update."""
        player = update.player
        state = self.state
        set_trainable(self.players, player)
        batches = []
        for i, indices in enumerate(self.indices):
            with precision.autocast(self.accelerator):
                batch = self.micro_batch(update, i, indices, earlier)
                loss, logs = update.loss(batch.x, state.nets, batch.batch, batch.numbers)
            one = 1 + 0 * loss.detach()  # a non-finite loss makes all gradients non-finite, on every process
            (loss / len(self.indices)).backward(one)
            batches.append(batch.detach())
            samples = describe_samples(batch.x) if batch.x.requires_grad else {}
            self.log(player, {"loss": loss} | logs | samples)
        if update.walk:
            self.continued = batches
        average(self.players[player], self.accelerator)
        norm = clip(self.players[player], self.cfg.norm(player))
        state.logs[f"{player}/grad_norm"] = norm
        if torch.isfinite(norm):
            self.apply(player, norm)
        else:  # raises unless the update may be skipped
            handle_nonfinite_update(state, self.method, update, batches, self.cfg, self.accelerator)
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
        """Take the optimizer's step with gradients of this norm, then update the moving average and counters."""
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
        if player == "student":
            seen = state.step * cfg.train_batch_size
            updates = count_updates(self.method, "student", state.step)
            state.ema.update(state.nets.student.denoiser.net, cfg.train_batch_size, seen, updates)
            self.method.after_student_step(state.nets)
