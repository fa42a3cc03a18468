"""Names of UNet modules in Stable Diffusion's original code, and kohya's LoRA file.

ComfyUI and stable-diffusion-webui add alpha / r up down to a module. The key is lora_unet_ and the module's name with
"_" for ".", then .lora_down.weight [r, in, ...kernel], .lora_up.weight [out, r, ...ones] or .alpha. This holds for
SD 1.5, SD 2.1 and SDXL.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipelines.export.single_files import lora_adapters, write_tensors

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

RESNET = {  # diffusers -> original code (CompVis/latent-diffusion openaimodel.py: UNetModel)
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def original_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """{diffusers' name: name in the original code} of every module with weights."""
    prefix = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    prefix["mid_block.resnets.1"] = "middle_block.2"
    n = 1
    for b, block in enumerate(unet.down_blocks):
        for i in range(len(block.resnets)):
            prefix[f"down_blocks.{b}.resnets.{i}"] = f"input_blocks.{n}.0"
            prefix[f"down_blocks.{b}.attentions.{i}"] = f"input_blocks.{n}.1"
            n += 1
        if block.downsamplers:
            prefix[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for b, block in enumerate(unet.up_blocks):
        for i in range(len(block.resnets)):
            prefix[f"up_blocks.{b}.resnets.{i}"] = f"output_blocks.{n}.0"
            prefix[f"up_blocks.{b}.attentions.{i}"] = f"output_blocks.{n}.1"
            n += 1
        if block.upsamplers:
            prefix[f"up_blocks.{b}.upsamplers.0.conv"] = (
                f"output_blocks.{n - 1}.{1 + hasattr(block, 'attentions')}.conv"
            )
    names = {}
    for key in unet.state_dict():
        name = key.rpartition(".")[0].partition(".lora_")[0].removesuffix(".base_layer")
        head = next((h for h in prefix if name == h or name.startswith(h + ".")), None)
        if head is not None:
            tail = name[len(head) + 1 :]
            names[name] = ".".join(filter(None, (prefix[head], RESNET.get(tail, tail) if "resnets" in head else tail)))
        elif name in OUTER:
            names[name] = OUTER[name]
    return names


def write_lora_file(
    net: UNet2DConditionModel, path: Path, metadata: dict[str, str], dtype: torch.dtype = torch.float16
) -> Path:
    """Write the adapters of a UNet in kohya's keys with the true alpha.

    Names are those of kohya's trainer: the original code's for SDXL, diffusers' for SD 1.5 and 2.1. The ss_ entries
    name the base for stable-diffusion-webui.
    """
    names = original_names(net)
    sdxl = net.config.addition_embed_type == "text_time"
    metadata = dict(metadata)
    if sdxl:
        metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    elif net.config.cross_attention_dim == 1024:
        metadata["ss_v2"] = "True"
    tensors = {}
    for name, adapter in lora_adapters(net).items():
        if name not in names:
            raise ValueError(f"ComfyUI has no module for {name!r}: leave it out of the LoRA's targets")
        key = "lora_unet_" + (names[name] if sdxl else name).replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = adapter.down
        tensors[f"{key}.lora_up.weight"] = adapter.up
        tensors[f"{key}.alpha"] = torch.tensor(adapter.alpha)
    return write_tensors(tensors, path, metadata, dtype)
