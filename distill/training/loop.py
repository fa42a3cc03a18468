"""The co-training loop: whose parameters move, under which loss, how often. It yields after every step.

Gradients are averaged over processes by one bucketed all-reduce when a player's micro-batches are done. A player may
call its networks any number of times, tap features, stop early or differentiate forward: nothing depends on hooks of
a wrapper, and accumulation needs no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distill.method import Method
from distill.random import Draw
from distill.roles import Batch, Nets
from distill.training import nonfinite, precision
from distill.training.config import TrainConfig
from distill.training.prepare import begin
from distill.training.state import State
from distill.training.step import average, began, clip, count_updates, own

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
    """Co-train the players of `method`, yielding the state after every step until `cfg.max_train_steps`.

    A finished run, resumed, yields its state once.
    data(draw) -> batch with "c" and what the method needs. resume: a checkpoint folder to continue, bit for bit.
    draw: the source of random numbers, called (seed, step, player, samples [B]); replaced in tests.
    """
    state = begin(nets, data, cfg, accelerator, resume, draw)
    players = {player: optimizer.param_groups[0]["params"] for player, optimizer in state.optimizers.items()}
    rates = cfg.rates()
    micro = cfg.micro_batch(accelerator.num_processes)
    first = accelerator.process_index * micro * cfg.gradient_accumulation_steps
    samples = torch.arange(first, first + micro * cfg.gradient_accumulation_steps, device=accelerator.device)
    walked: list[nonfinite.Turn] = []  # the last step's samples, where the next one's go on from them
    if state.step >= cfg.max_train_steps:
        yield state
    while state.step < cfg.max_train_steps:
        step, state.logs = state.step, {}
        kept: list[nonfinite.Turn] = []
        for update in method.updates():
            if step % update.every and step >= update.alone or step < update.start:
                continue
            player, optimizer = update.player, state.optimizers[update.player]
            own(players, player)
            done = []
            for i, indices in enumerate(samples.split(micro)):
                numbers = draw(cfg.seed, step, player, indices)
                with precision.autocast(accelerator):
                    if update.reuse and kept:
                        (x, batch, *_), source = kept[i], None
                    else:
                        batch, source = data(numbers), numbers
                        if update.walk:
                            late = began(method, nets, step)
                            source = draw(cfg.seed, step - late, player, indices)
                            if late and walked:
                                source.before, begun, *_ = walked[i]
                            elif late:  # a resumed run
                                begun = data(source)
                            source.late, batch = late, batch | {"c": begun.get("c")} if late else batch
                        with torch.set_grad_enabled(player == "student"):
                            x = method.sample(nets, batch, source)
                    loss, logs = update.loss(x, nets, batch, numbers)
                one = 1 + 0 * loss.detach()  # a loss that is not finite makes all gradients so, on every process
                (loss / cfg.gradient_accumulation_steps).backward(one)
                done.append(nonfinite.Turn(x.detach(), batch, numbers, source))
                logs = {"loss": loss} | logs | (nonfinite.samples(x) if x.requires_grad else {})
                for name, value in {f"{player}/{k}": v for k, v in logs.items()}.items():
                    value = value.detach() / cfg.gradient_accumulation_steps
                    state.logs[name] = state.logs.get(name, 0.0) + value
            kept, walked = done, done if update.walk else walked
            average(players[player], accelerator)
            state.logs[f"{player}/grad_norm"] = norm = clip(players[player], cfg.norm(player))
            if not torch.isfinite(norm):
                nonfinite.refuse(state, method, update, done, cfg, accelerator)  # raises, unless it may be left out
                continue
            limit = cfg.max_grad_value if player == "student" else cfg.fake_max_grad_value
            if limit is not None:
                torch.nn.utils.clip_grad_value_(players[player], limit)
            for group in optimizer.param_groups:
                group["lr"] = rates[player] * cfg.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.skipped.pop(player, None)
            if cfg.skip_nonfinite:
                state.logs[f"{player}/skipped"] = torch.zeros_like(norm)
            if player == "student":
                seen, updates = step * cfg.train_batch_size, count_updates(method, "student", step)
                state.ema.update(nets.student.denoiser.net, cfg.train_batch_size, seen, updates)
                method.after_student_step(nets)
        own(players, *players)
        state.step += 1
        yield state
