"""SANA: a linear-attention flow transformer on deep-compression latents, Gemma text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from distill.denoiser import Condition, Denoiser
from pipelines import Parts, Teacher, latents

UNCONDITIONAL = 1.0  # guidance_scale of the pipeline that makes one call a step
CALL: dict[str, Any] = {
    "guidance_scale": 1,
    "use_resolution_binning": False,
}  # options of the call that a model card shows
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")  # modules of a LoRA
TAPS = ("transformer_blocks.9",)  # modules whose output is a discriminator's feature: the middle of 20
BLOCKS = ("SanaTransformerBlock",)  # classes of modules that are sharded one by one


def call(net: Any, x: Tensor, n: Tensor, c: Condition) -> Tensor:
    """c: "prompt_embeds" [B, 300, D] and their "mask" [B, 300]."""
    assert c is not None
    told = n * net.config.timestep_scale
    text = c["prompt_embeds"].to(x.dtype)
    return net(x, text, told, encoder_attention_mask=c["mask"], return_dict=False)[0]


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    def embed(prompts: Sequence[str], instruction: list[str] | None) -> Condition:
        options = {"device": parts.device, "complex_human_instruction": instruction}
        text, mask, *_ = parts.text.encode_prompt(list(prompts), False, **options)
        return {"prompt_embeds": text, "mask": mask}

    def encode(prompts: Sequence[str]) -> Condition:
        defaults = inspect.signature(type(parts.text).__call__).parameters
        return embed(prompts, defaults["complex_human_instruction"].default)

    def negative(prompts: Sequence[str]) -> Condition:
        return embed(prompts, None)  # the pipeline puts its instruction before prompts only

    decode, latent = latents.dc(parts)
    denoiser = Denoiser(parts.net, *latents.flow(parts.scheduler()), call=call)
    shape = latents.shape(parts, resolution, parts.net.config.patch_size)
    return Teacher(denoiser, encode, decode, latent, shape, parts, negative)


def sample(
    pipe: Any, prompts: Sequence[str], z: Tensor, steps: int, guidance: float, negative: str | None = None
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of the pipeline itself from unit noise z."""
    height, width = (side * pipe.vae_scale_factor for side in z.shape[-2:])
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
    plain = {"use_resolution_binning": False, "output_type": "pt"}
    return pipe(list(prompts), negative or "", latents=z, **options, **plain).images


def tiny() -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    from pipelines import tiny

    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        encoder_layers_per_block=(1,) * 3,
        decoder_layers_per_block=(1,) * 3,
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    ).eval()
    net = SanaTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=10,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    tiny.louder(net, 3.0, "attn2")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return SanaPipeline(tiny.gemma_tokenizer(), tiny.gemma(16), vae, net, DPMSolverMultistepScheduler(**flow))
