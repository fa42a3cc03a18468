"""Single files of a student: its network and its LoRA, in the format of plain diffusers.

Names are unique (`<name>_<n>step_unet.safetensors`), because users keep files of many models in one folder. Metadata
are Stability AI's ModelSpec 1.0.1 keys (github.com/Stability-AI/ModelSpec), and for a LoRA diffusers'
`lora_adapter_metadata`: without it diffusers guesses the targets from the keys and takes alpha = rank.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from distill.files import atomic_file
from distill.networks.lora import merge_adapters
from pipelines.protocols import config_of

ARCHITECTURES = {
    "SD3Transformer2DModel": "stable-diffusion-3",
    "FluxTransformer2DModel": "flux-1",
}  # kohya's sd-scripts
PREDICTIONS = {"eps": "epsilon", "v": "v"}  # words of the specification; other kinds keep ours


@dataclass(frozen=True)
class Adapter:
    """W + alpha / r up down: down [r, in, ...kernel], up [out, r, ...ones]."""

    down: Tensor
    up: Tensor
    alpha: float


def network_name(net: nn.Module) -> str:
    """The pipeline's name for the network, which is also the prefix of LoRA keys: "unet" or "transformer"."""
    return "unet" if "UNet" in type(net).__name__ else "transformer"


def file_name(name: str, steps: int, what: str) -> str:
    """<name>_<steps>step_<what>.safetensors; what: network_name(net), "lora", "lora_comfy" or "checkpoint"."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"the name {name!r} goes into file names: use letters, digits, '.', '_' and '-' only")
    return f"{name}_{steps}step_{what}.safetensors"


def architecture(net: nn.Module, kind: str) -> str:
    """modelspec.architecture: the spec's id for Stable Diffusion, sd-scripts' for SD3 and FLUX, else the class."""
    if (name := type(net).__name__) != "UNet2DConditionModel":
        return ARCHITECTURES.get(name, name)
    if config_of(net).addition_embed_type == "text_time":
        return "stable-diffusion-xl-v1-base"
    if config_of(net).cross_attention_dim == 1024:
        return "stable-diffusion-v2-768-v" if kind == "v" else "stable-diffusion-v2-512"
    return "stable-diffusion-v1"


def modelspec(
    net: nn.Module, kind: str, title: str, size: tuple[int, int], lora: bool = False, **optional: str | None
) -> dict[str, str]:
    """ModelSpec metadata. size: (width, height); optional: author, license, description, usage_hint, ..."""
    keys = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture(net, kind) + ("/lora" if lora else ""),
        "implementation": "diffusers",
        "title": title,
        "resolution": f"{size[0]}x{size[1]}",
        "prediction_type": PREDICTIONS.get(kind, kind),
        **optional,
    }
    return {f"modelspec.{key}": value for key, value in keys.items() if value}


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str], dtype: torch.dtype) -> Path:
    """Write a safetensors file with float arrays in `dtype`. ValueError if they overflow or the disk is too small."""
    out = {}
    for name, t in tensors.items():
        out[name] = t.detach().to("cpu", dtype if t.is_floating_point() and t.ndim else t.dtype).contiguous()
        if t.is_floating_point() and not torch.isfinite(out[name]).all():
            raise ValueError(f"{name} does not fit into {dtype}: its largest entry is {t.abs().max():.3g}")
    size = sum(t.nbytes for t in out.values())
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise ValueError(f"{path} needs {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f}: free some space")
    from safetensors.torch import save_file

    with atomic_file(path) as partial:
        save_file(out, partial, {"format": "pt", **metadata})
    return path


def write_network_file(
    net: nn.Module, path: Path, metadata: dict[str, str], dtype: torch.dtype = torch.float16
) -> Path:
    """Write the network with merged adapters in diffusers' keys."""
    return write_tensors(merge_adapters(net).state_dict(), path, metadata, dtype)


def lora_adapters(net: nn.Module) -> dict[str, Adapter]:
    """The LoRA layers of a role by the backbone's module names. ValueError if there are none."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, m in net.named_modules():
        if isinstance(m, LoraLayer):
            (key,) = m.lora_A
            down = m.lora_A[key].weight
            up = m.lora_B[key].weight
            found[name] = Adapter(down, up, m.scaling[key] * len(down))
    if not found:
        raise ValueError("this student has no LoRA layers: it was trained in full, export its network instead")
    return found


def write_lora_file(net: nn.Module, path: Path, metadata: dict[str, str], dtype: torch.dtype = torch.float16) -> Path:
    """Write adapters for `pipe.load_lora_weights(path)`: PEFT's keys and its config, so that nothing is guessed.

    The config contains only values that differ from PEFT's defaults: an older PEFT refuses unknown keys.
    """
    from peft import LoraConfig

    prefix = network_name(net)
    tensors = {}
    for name, adapter in lora_adapters(net).items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = adapter.down
        tensors[f"{prefix}.{name}.lora_B.weight"] = adapter.up
    (config,) = cast(dict[str, LoraConfig], net.peft_config).values()
    default = LoraConfig().to_dict()
    config = {k: v for k, v in config.to_dict().items() if k in ("r", "lora_alpha") or v != default[k]}
    packed = {f"{prefix}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return write_tensors(
        tensors, path, {**metadata, "lora_adapter_metadata": json.dumps(packed, sort_keys=True)}, dtype
    )
