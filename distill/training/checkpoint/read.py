"""Load a state from a checkpoint, and the initial weights of a network from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.diffusion.end_time import SECOND
from distill.files import read_json
from distill.networks.multiplier import DUAL
from distill.training.checkpoint.contents import network_tensors, state_tensors, tensor_path
from distill.training.checkpoint.integrity import find_corruption, read_state_file
from distill.training.checkpoint.tensors import TensorReader
from distill.training.state import State

OPTIONAL = (SECOND, DUAL)  # prefixes of tensors that a network may lack


def load(state: State, folder: Path) -> None:
    """Restore `state` in place from a checkpoint of the same method and networks. ValueError for a damaged one."""
    if why := find_corruption(folder):
        raise ValueError(why)
    for name, tensors in state_tensors(state, empty=True).items():
        path = tensor_path(folder, name)
        if not path.exists():
            raise ValueError(f"{folder} has no {path.name}: it is not a checkpoint of this method and networks")
        stored = TensorReader(path)
        if name.startswith("optimizer_"):
            if not _load_optimizer(state.optimizers[name.removeprefix("optimizer_")], stored):
                raise ValueError(f"{path} is not of this run's parameters: use the configuration of that run")
            continue
        if stored.shapes != {key: tuple(t.shape) for key, t in tensors.items()}:
            raise ValueError(f"{path} holds other tensors than this run's {name}: use the configuration of that run")
        stored.read_into(tensors)
    facts = read_state_file(folder)
    state.step = facts["step"]
    state.skipped = facts.get("skipped", {})


def weight_files(path: str | Path, role: str) -> list[Path]:
    """The .safetensors files with weights of `role`, "student" or "fake", at `path`. A ValueError lists what it may be:

    a checkpoint-N folder of a run (the student's average, if the run has one), the folder of a diffusers network (also
    in shards) or of a pipeline, or a .safetensors file.
    """
    path = Path(path)
    name = "ema" if role == "student" and tensor_path(path, "ema").exists() else role
    found = [path] if path.suffix == ".safetensors" else []
    if (path / "state.json").is_file():
        found = [tensor_path(path, name)]
    for folder in (path, path / "unet", path / "transformer"):
        whole = folder / "diffusion_pytorch_model.safetensors"
        shards = folder / "diffusion_pytorch_model.safetensors.index.json"
        if whole.is_file():
            found = [whole]
        elif shards.is_file():
            names = _shard_names(shards, role)
            found = [folder / name for name in names]
    missing = [file for file in found if not file.exists()]
    if missing or not found:
        lack = f"has no {missing[0].name}" if missing else "holds no weights"
        raise ValueError(
            f"{role}.init is {str(path)!r}, which {lack}; it may be a checkpoint-N folder of a run (with {name}."
            "safetensors), a folder with diffusion_pytorch_model.safetensors, or a .safetensors file"
        )
    return found


def _shard_names(index: Path, role: str) -> list[str]:
    """The files in an index of sharded weights. ValueError if it is not an index, or names files elsewhere."""
    tree = read_json(index)
    table = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{role}.init: {index} is not an index of weights: it has no table weight_map")
    names = {name if isinstance(name, str) else repr(name) for name in table.values()}
    if odd := [name for name in sorted(names) if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ValueError(f"{role}.init: {index} names {odd[0]!r}; it may name .safetensors files beside it")
    return sorted(names)


@torch.no_grad()
def load_initial_weights(net: nn.Module, path: str | Path, role: str, backbone: nn.Module) -> None:
    """Load initial weights of `net` from `path` (see `weight_files`): all trained tensors, and others that it does not
    share.

    backbone: the network whose tensors `net` may share. They are never written, and a file of an adapter has none of
    them. A ValueError names the first tensor that is missing, unknown or of another shape; then nothing was written.
    Only a second time (end_time.py) and a multiplier (multiplier.py) may be missing or extra: they do not change the
    network.
    """
    shared = {id(t) for t in (*backbone.parameters(), *backbone.buffers())}
    own = {name: t for name, t in network_tensors(net).items() if id(t) not in shared}
    readers = [TensorReader(file) for file in weight_files(path, role)]
    shapes = {key: shape for reader in readers for key, shape in reader.shapes.items()}
    wrong = _list_misfits(net, own, shapes, role)
    if wrong:
        raise ValueError(f"{role}.init {str(path)!r} does not fit: {wrong[0]} ({len(wrong)} such); see {role}.lora too")
    for reader in readers:
        reader.read_into({name: t for name, t in own.items() if name in reader.shapes})


def _list_misfits(net: nn.Module, own: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], role: str) -> list[str]:
    """Reasons why weights of these shapes do not fit a network with its own tensors `own`."""
    needed = [name for name, p in net.named_parameters() if p.requires_grad and not name.startswith(OPTIONAL)]
    known = {*own, *dict(net.named_buffers())}
    unknown = [name for name in shapes if name not in known and not name.startswith(OPTIONAL)]
    wrong = [f"it has no {name}" for name in needed if name not in shapes]
    wrong += [f"it has {name}, which this {role} does not" for name in unknown]
    for name, t in own.items():
        shape = tuple(t.shape)
        if shapes.get(name, shape) != shape:
            wrong.append(f"its {name} is {shapes[name]}, this {role}'s {shape}")
    return wrong


def _load_optimizer(optimizer: torch.optim.Optimizer, stored: TensorReader) -> bool:
    """Load the moments of an optimizer. False if they do not fit its parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {key: int(key.split(".", 1)[0]) for key in stored.shapes}
    entries: dict[int, dict[str, Any]] = {}
    for key, tensor in stored.read_like({key: params[i] for key, i in numbers.items() if i < len(params)}).items():
        i, name = key.split(".", 1)
        whole = tensor.ndim == 0 and not tensor.is_floating_point()  # the 8-bit optimizer counts its steps in Python
        entries.setdefault(int(i), {})[name] = int(tensor) if whole else tensor
    moment = "exp_avg" if isinstance(optimizer, torch.optim.AdamW | torch.optim.RAdam) else "state1"
    shapes = {i: entry[moment].shape if moment in entry else None for i, entry in entries.items()}
    if any(i >= len(params) or shape != params[i].shape for i, shape in shapes.items()):
        return False
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return True
