"""A replay: a folder with which any machine can compute a non-finite update again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import sharding
from distill.files import read_json
from distill.method import Method
from distill.random import Draw
from distill.roles import Batch, Nets
from distill.training import checkpoint
from distill.training.config import TrainConfig
from distill.training.findings import Recomputation, examine, named_tensors
from distill.training.prepare import prepare_state
from distill.training.samples import MicroBatch
from distill.training.state import State
from distill.training.step import set_trainable

if TYPE_CHECKING:
    from accelerate import Accelerator

FACTS = ("message", "step", "player", "seed", "processes", "mixed_precision", "ranks")  # facts in a replay folder


def replay_update(
    folder: Path,
    method: Method,
    nets: Nets,
    data: Callable[[Draw], Batch],
    cfg: TrainConfig,
    accelerator: Accelerator,
) -> dict[int, list[Recomputation]]:
    """Compute the micro-batches of a replay folder again with its weights. Returns the findings by the rank that had
    them."""
    facts = read_facts(folder)
    step = facts["step"]
    player = facts["player"]
    state = prepare_state(nets, data, cfg, accelerator, folder / f"checkpoint-{step}")
    set_trainable({name: optimizer.param_groups[0]["params"] for name, optimizer in state.optimizers.items()}, player)
    update = next(update for update in method.updates() if update.player == player)
    findings = {}
    for rank, ones in facts["ranks"].items():
        tensors = _unflatten(load_file(folder / f"rank{rank}.safetensors", device=f"{accelerator.device}"))
        indices = [torch.tensor(one["samples"], device=accelerator.device) for one in ones]
        batches = [_restored(tensors[f"{i}"], one, facts) for i, one in enumerate(indices)]
        findings[int(rank)] = examine(state, method, update, batches, accelerator)
    return findings


def _restored(tensors: dict[str, Any], indices: Tensor, facts: dict[str, Any]) -> MicroBatch:
    """A micro-batch from the tensors of `_replay_tensors`."""
    seed = facts["seed"]
    step = facts["step"]
    player = facts["player"]
    numbers = Draw(seed, step, player, indices)
    if "x" in tensors:
        return MicroBatch(tensors["x"], tensors["batch"], numbers, None)
    late = int(tensors["late"]) if "late" in tensors else None
    source = Draw(seed, step - (late or 0), player, indices)
    source.late = late
    source.before = tensors.get("before")
    return MicroBatch(indices, tensors["batch"], numbers, source)


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of a replay folder: message, step, player, seed, processes, mixed_precision, ranks."""
    try:
        facts = read_json(folder / "replay.json")
        if absent := [name for name in FACTS if not isinstance(facts, dict) or name not in facts]:
            raise ValueError(f"its replay.json has no {absent[0]}")
        return facts
    except ValueError as error:
        raise ValueError(
            f"replay is {str(folder)!r}, which is no replay-STEP-PLAYER folder of a run ({error})"
        ) from None


def write_replay(
    folder: Path, state: State, batches: list[MicroBatch], facts: dict[str, Any], accelerator: Accelerator
) -> Exception | None:
    """Write this process's part of a replay: its micro-batches, if it is in facts["ranks"]. The main process also
    writes the facts and the weights, without Adam's moments."""
    try:
        if accelerator.is_main_process or sharding.is_fsdp_launch(accelerator):  # saving sharded weights is collective
            players = {name: optimizer.param_groups[0]["params"] for name, optimizer in state.optimizers.items()}
            weights: dict[str, torch.optim.Optimizer] = {name: torch.optim.SGD(ps, 0.0) for name, ps in players.items()}
            checkpoint.save(replace(state, optimizers=weights), folder)
        if accelerator.is_main_process:
            (folder / "replay.json").write_text(json.dumps(facts, indent=1))
            if (folder.parent / "config.yaml").is_file():
                shutil.copy(folder.parent / "config.yaml", folder)
        if accelerator.process_index in facts["ranks"]:
            folder.mkdir(parents=True, exist_ok=True)
            stored = named_tensors([_replay_tensors(batch) for batch in batches])
            tensors = {name: t.detach().cpu().clone() for name, t in stored}
            save_file(
                {name: t.contiguous() for name, t in tensors.items()},
                folder / f"rank{accelerator.process_index}.safetensors",
            )
    except (OSError, SafetensorError) as error:  # a full disk must not hide the original error
        return error
    return None


def _replay_tensors(batch: MicroBatch) -> dict[str, Any]:
    """The tensors of a micro-batch that cannot be computed again from the seed."""
    if batch.source is None:
        return {"batch": batch.batch, "x": batch.x}
    if batch.source.late is None:
        return {"batch": batch.batch}
    return {"batch": batch.batch, "late": torch.tensor(batch.source.late), "before": batch.source.before}


def _unflatten(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Nested dicts from the names of `named_tensors`."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = name.split("/")
        branch = tree
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = tensor
    return tree
