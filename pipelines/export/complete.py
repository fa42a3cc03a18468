"""A complete checkpoint of a student of SD 1.5 or SDXL in the original code's names, for A1111, Forge and ComfyUI.

It holds UNet, text encoders and VAE: `model.diffusion_model.*`, `cond_stage_model.*` (SDXL: `conditioner.embedders.*`)
and `first_stage_model.*`. Facts about the names: CompVis/latent-diffusion, Stability-AI/generative-models and
mlfoundations/open_clip.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import VP
from distill.networks.lora import merge_adapters
from pipelines.components import Network, Parts
from pipelines.export.comfyui import is_sd_table
from pipelines.export.kohya import original_names
from pipelines.export.single_files import architecture, write_tensors

State = dict[str, Tensor]
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"  # the value of ModelSpec for these names
VAE_PARTS = (  # diffusers -> original code, in this order; {} of an up block is counted from the other end
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.", r"up.\1.block."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"attn_1\.group_norm\.", "attn_1.norm."),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
    (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
)
OPEN_CLIP = (
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.", ""),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
)


def write_complete_file(
    net: nn.Module, parts: Parts, path: Path, metadata: dict[str, str], dtype: torch.dtype = torch.float16
) -> Path:
    """Write the network with merged adapters, and the text encoders and the VAE of `parts`.

    ValueError for tensors that the original code has not.
    """
    sdxl = architecture(cast(Network, net), "eps") == "stable-diffusion-xl-v1-base"
    clip = parts.component("text_encoder").state_dict()
    tensors = unet_tensors(merge_adapters(net)) | vae_tensors(parts.component("vae").state_dict())
    tensors |= clip_tensors(clip, "conditioner.embedders.0" if sdxl else "cond_stage_model")
    if sdxl:
        open_clip = parts.component("text_encoder_2").state_dict()
        if _width(clip) == _width(open_clip):
            raise ValueError("both text encoders have one width, by which diffusers' reader tells them apart")
        tensors |= open_clip_tensors(open_clip, "conditioner.embedders.1.model")
    return write_tensors(tensors, path, metadata, dtype)


def is_supported(denoiser: Denoiser) -> bool:
    """Whether the readers of such files know the base, its prediction type and its table of noise."""
    known = ("stable-diffusion-v1", "stable-diffusion-xl-v1-base")
    eps = denoiser.kind == "eps" and architecture(cast(Network, denoiser.net), denoiser.kind) in known
    return eps and isinstance(denoiser.schedule, VP) and is_sd_table(denoiser.schedule)


def unet_tensors(unet: nn.Module) -> State:
    """The UNet's tensors by the original names."""
    names = original_names(unet)
    tensors = {}
    for key, value in unet.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if module not in names:
            raise ValueError(f"the original code has no tensor {key!r} of a UNet")
        tensors[f"model.diffusion_model.{names[module]}.{leaf}"] = value
    return tensors


def vae_tensors(state: State) -> State:
    """The tensors of an AutoencoderKL by the original names. Its attention is a convolution there."""
    levels = 1 + max(int(found[1]) for key in state if (found := re.search(r"up_blocks\.(\d+)\.", key)))
    tensors = {}
    for key, value in state.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", key)
        for pattern, replacement in VAE_PARTS:
            name = re.sub(rf"(?<![^.]){pattern}", replacement, name)
        kernel = ".attn_1." in name and value.ndim == 2
        tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if kernel else value
    return tensors


def clip_tensors(state: State, prefix: str) -> State:
    """The tensors of CLIP ViT-L by the names of transformers 4, in which every key begins with text_model."""
    return {f"{prefix}.transformer.text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}


def open_clip_tensors(state: State, prefix: str) -> State:
    """The tensors of a CLIPTextModelWithProjection by open_clip's names: q, k and v of a layer are one matrix."""
    tensors: State = {}
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        if name == "text_projection.weight":
            tensors[f"{prefix}.text_projection"] = value.T
            continue
        for pattern, replacement in OPEN_CLIP:
            name = re.sub(pattern, replacement, name)
        if not (found := re.fullmatch(r"(.*\.attn\.)[qkv]_proj\.(weight|bias)", name)):
            tensors[f"{prefix}.{name}"] = value
        elif name.startswith(f"{found[1]}q_proj"):
            rows = [state[key.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            tensors[f"{prefix}.{found[1]}in_proj_{found[2]}"] = torch.cat(rows)
    return tensors


def _width(state: State) -> int:
    """The width of a CLIP text encoder."""
    (table,) = (value for key, value in state.items() if key.endswith("embeddings.position_embedding.weight"))
    return table.shape[1]
