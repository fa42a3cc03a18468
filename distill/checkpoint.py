"""Checkpoints: everything a run is, as safetensors and JSON; written whole or not at all. The teacher is not in them.

`checkpoint-N/` holds one file a role (student, fake, disc, target), the student's average `ema`, one file an optimizer
and `state.json`. Random numbers need no state (draw.py), so a resumed run equals the uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from distill.trainer import State


def save(state: State, output_dir: Path, limit: int | None = None) -> Path:
    """Write `checkpoint-{state.step}` and keep the newest `limit` (None: all)."""
    folder = output_dir / f"checkpoint-{state.step}"
    partial = output_dir / f".checkpoint-{state.step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in _tensors(state).items():
        own = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}  # none may share memory
        save_file(own, partial / f"{name}.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": state.step, "torch": torch.__version__}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    if limit is not None:
        for old in found(output_dir)[:-limit]:
            shutil.rmtree(old)
    return folder


def load(state: State, folder: Path) -> None:
    """Restore `state` in place from a checkpoint of the same method and networks."""
    for name, tensors in _tensors(state, empty=True).items():
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise ValueError(f"{folder} has no {path.name}: it is not a checkpoint of this method and networks")
        stored = load_file(path)
        if name.startswith("optimizer_"):
            if not _load_optimizer(state.optimizers[name.removeprefix("optimizer_")], stored):
                raise ValueError(f"{path} is not of this run's parameters: use the configuration of that run")
            continue
        if stored.keys() != tensors.keys() or any(stored[k].shape != t.shape for k, t in tensors.items()):
            raise ValueError(f"{path} holds other tensors than this run's {name}: use the configuration of that run")
        with torch.no_grad():
            for key, tensor in tensors.items():
                tensor.copy_(stored[key])
    state.step = step(folder)


def averaged(net: nn.Module, folder: Path) -> None:
    """Give a student's network the averaged weights of a checkpoint."""
    stored, tensors = load_file(folder / "ema.safetensors"), _named(net)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    wrong = sorted(trained - stored.keys()) or sorted(k for k, t in stored.items() if _shape(tensors, k) != t.shape)
    if wrong:
        raise ValueError(f"{folder} was not trained on this teacher with this student: they differ in {wrong[0]}")
    with torch.no_grad():
        for key, tensor in stored.items():
            tensors[key].copy_(tensor)


def _shape(tensors: dict[str, Tensor], key: str) -> Any:
    return tensors[key].shape if key in tensors else None


def step(folder: Path) -> int:
    """Iterations done when a checkpoint was saved."""
    return json.loads((folder / "state.json").read_text())["step"]


def found(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in folders if (p / "state.json").is_file()), key=lambda p: int(p.name.split("-")[1]))


def _tensors(state: State, empty: bool = False) -> dict[str, dict[str, Tensor]]:
    """File name -> tensors. Frozen parameters (the backbone of an adapter) are left out."""
    owned = {id(p) for optimizer in state.optimizers.values() for g in optimizer.param_groups for p in g["params"]}
    files = {role: _named(net, owned if role != "target" else None) for role, net in state.nets.modules().items()}
    student = files["student"].keys()
    files["ema"] = {key: t for key, t in _named(state.ema.net).items() if key in student}
    if "target" in files:
        files["target"] = {key: t for key, t in files["target"].items() if key in student}
    for player, optimizer in state.optimizers.items():
        entries = [] if empty else [optimizer.state.get(p, {}) for g in optimizer.param_groups for p in g["params"]]
        moments = {f"{i}.{key}": value for i, entry in enumerate(entries) for key, value in entry.items()}
        files[f"optimizer_{player}"] = {key: torch.as_tensor(value) for key, value in moments.items()}
    return files


def _named(net: nn.Module, owned: set[int] | None = None) -> dict[str, Tensor]:
    parameters = {name: p for name, p in net.named_parameters() if owned is None or id(p) in owned}
    return parameters | dict(net.named_buffers())


def _load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> bool:
    """False if the moments do not fit the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Any]] = {}
    for key, tensor in stored.items():
        i, name = key.split(".", 1)
        whole = tensor.ndim == 0 and not tensor.is_floating_point()  # the 8-bit optimizer counts its steps in Python
        entries.setdefault(int(i), {})[name] = int(tensor) if whole else tensor
    moment = "exp_avg" if isinstance(optimizer, torch.optim.AdamW) else "state1"
    shapes = {i: entry[moment].shape if moment in entry else None for i, entry in entries.items()}
    if any(i >= len(params) or shape != params[i].shape for i, shape in shapes.items()):
        return False
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return True
