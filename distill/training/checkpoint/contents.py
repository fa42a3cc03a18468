"""The tensors in the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from distill.training.state import State


def state_tensors(state: State, empty: bool = False) -> dict[str, dict[str, Tensor]]:
    """{file name: tensors}. Frozen parameters, such as the backbone of an adapter, are left out.

    empty: without the moments of the optimizers.
    """
    owned = {id(p) for optimizer in state.optimizers.values() for g in optimizer.param_groups for p in g["params"]}
    files = {
        role: network_tensors(net, owned if role != "target" else None) for role, net in state.nets.modules().items()
    }
    student = files["student"].keys()
    if state.ema.net is not state.nets.student.denoiser.net:
        files["ema"] = {key: t for key, t in network_tensors(state.ema.net).items() if key in student}
    if "target" in files:
        files["target"] = {key: t for key, t in files["target"].items() if key in student}
    for player, optimizer in state.optimizers.items():
        files[f"optimizer_{player}"] = {} if empty else optimizer_tensors(optimizer)
    return files


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of parameter i, with names like "i.exp_avg"."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {}
    for i, p in enumerate(parameters):
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{i}.{key}"] = torch.as_tensor(value)
    return tensors


def network_tensors(net: nn.Module, owned: set[int] | None = None) -> dict[str, Tensor]:
    parameters = {name: p for name, p in net.named_parameters() if owned is None or id(p) in owned}
    return parameters | dict(net.named_buffers())


def tensor_path(folder: Path, name: str) -> Path:
    """The file of a checkpoint, or the folder of its shards."""
    return folder / name if (folder / name).is_dir() else folder / f"{name}.safetensors"
