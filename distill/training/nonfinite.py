"""Handling of a non-finite gradient: name it on every rank, write a replay, then stop the run or skip the update.

The check follows the averaging of gradients, so a NaN on one process stops all processes at the same update. Only then
does each process examine its own micro-batches (findings.py).
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distill.method import Method, Update
from distill.training.config import TrainConfig
from distill.training.findings import Recomputation, examine
from distill.training.replay import write_replay
from distill.training.samples import MicroBatch
from distill.training.state import State

if TYPE_CHECKING:
    from accelerate import Accelerator

ADVICE = "Lower the learning rate, set max_grad_norm, or look at the data of this step"


def handle_nonfinite_update(
    state: State, method: Method, update: Update, batches: list[MicroBatch], cfg: TrainConfig, accelerator: Accelerator
) -> None:
    """Name what made an update non-finite, write a replay, and raise FloatingPointError.

    Up to `cfg.skip_nonfinite` consecutive updates of a player are skipped instead, with a warning on stderr and in the
    log. A replay is written for the first one of a player and for the fatal one. Collective: all processes must call
    it, and they decide the same.
    """
    from accelerate.utils import gather_object

    step = state.step
    player = update.player
    out = Path(cfg.output_dir)
    row = state.skipped.get(player, 0) + 1
    state.skipped[player] = row
    fatal = row > cfg.skip_nonfinite
    own = examine(state, method, update, batches, accelerator)
    has_replay = any(out.glob(f"replay-*-{player}"))
    findings, replays = zip(*gather_object([(own, has_replay)]), strict=True)
    bad = first_bad(findings)
    message = describe(bad, step, player)
    if fatal or not any(replays):
        folder = out / f"replay-{step}-{player}"
        ranks = [rank for rank in range(len(findings)) if rank in bad or not bad]
        facts: dict[str, Any] = {"message": message, "step": step, "player": player, "seed": cfg.seed}
        facts["processes"] = accelerator.num_processes
        facts["mixed_precision"] = accelerator.mixed_precision
        facts["ranks"] = {rank: [asdict(one) for one in findings[rank]] for rank in ranks}
        error = write_replay(folder, state, batches, facts, accelerator)
        errors = [f"{error}" for error in gather_object([error]) if error]  # waits until all have written
        message += f"; no replay could be written ({errors[0]})" if errors else f"; see it again: --replay {folder}"
    if fatal:
        raise FloatingPointError(f"{message}. {ADVICE}")
    if accelerator.is_main_process:
        sys.stderr.write(f"{message}; left out, {row} in a row of {cfg.skip_nonfinite} allowed\n")
    device = state.logs[f"{player}/loss"].device
    state.logs = {key: value for key, value in state.logs.items() if not key.startswith(f"{player}/")}
    state.logs[f"{player}/skipped"] = torch.ones((), device=device)


def first_bad(findings: tuple[list[Recomputation], ...]) -> dict[int, Recomputation]:
    """The worst finding of each rank that has one. If there are findings of single ranks, only those."""
    bad = {
        rank: min(filter(bool, ones), key=lambda one: not one.alone) for rank, ones in enumerate(findings) if any(ones)
    }
    return {rank: one for rank, one in bad.items() if one.alone} or bad


def describe(bad: dict[int, Recomputation], step: int, player: str) -> str:
    """A description of what is not finite, where, and on which ranks."""
    ranks = f"rank{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}" if bad else "no rank"
    what = next(iter(bad.values()), "computed again it is finite: a fault of a kernel or of the memory?")
    kind = "loss" if any("n" in one.loss for one in bad.values()) else "gradient"  # nan or inf
    return f"non-finite {kind} at step {step}, player {player!r}, {ranks}: {what}. The update was not applied"
