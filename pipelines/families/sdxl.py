"""Stable Diffusion XL: SD's UNet with two texts, a pooled embedding and image sizes. The null prompt is zeros."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from pipelines.components import Parts
from pipelines.families import latents, schedulers, sd, student_schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.protocols import Config, Pipeline

GUIDANCE = 5.0  # default input of a guidance embedding, as in the pipeline
LENGTH = 77  # tokens of a prompt
sample = partial(sd.sample, embedded=GUIDANCE)
call_options = partial(sd.call_options, embedded=GUIDANCE)


def call(net: nn.Module, x: Tensor, n: Tensor, c: Condition) -> Tensor:
    """c: "prompt_embeds" [B, 77, D], "pooled" [B, P], "time_ids" [B, 6]: original size, crop, target size, in pixels.

    A network with a guidance embedding also reads "guidance" w [B], as in SD.
    """
    assert c is not None
    embedded = sd.guidance(net, x, c, GUIDANCE)
    added = {"text_embeds": c["pooled"].to(x.dtype), "time_ids": c["time_ids"]}
    text = c["prompt_embeds"].to(x.dtype)
    return net(x, n, text, timestep_cond=embedded, added_cond_kwargs=added, return_dict=False)[0]


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    shape = latents.shape(parts, resolution)
    side = float(shape[-1] * latents.factor(parts))

    def encode(prompts: Sequence[str]) -> Condition:
        text, _, pooled, _ = parts.text.encode_prompt(list(prompts), None, parts.device, 1, False)
        sizes = torch.tensor([side, side, 0, 0, side, side]).expand(len(prompts), 6).to(text.device)
        return {"prompt_embeds": text, "pooled": pooled, "time_ids": sizes}

    decode, latent = latents.kl(parts, latents.channel_scale_and_shift)
    denoiser = Denoiser(parts.net, *schedulers.table(parts.scheduler()), call=call)
    if parts.index.get("force_zeros_for_empty_prompt", True):  # except the sizes: they stay those of the image
        config = parts.net.config
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        text = torch.zeros(1, LENGTH, config.cross_attention_dim)
        denoiser.null = {"prompt_embeds": text, "pooled": torch.zeros(1, width)}
    return Teacher(denoiser, encode, decode, latent, shape, parts, FAMILY)


def tiny() -> Pipeline:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from pipelines.families import tiny

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    net = sd.unet(
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    tiny.amplify(tiny.amplify(net, 4.0, "add_embedding"), 2.5, "conv_out")
    encoders = tiny.clip(), tiny.clip(projection=32), tiny.clip_tokenizer(), tiny.clip_tokenizer()
    return StableDiffusionXLPipeline(tiny.vae(scaling_factor=0.13025), *encoders, net, scheduler, add_watermarker=False)


def condition(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the condition of one sample."""
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {"prompt_embeds": (LENGTH, config.cross_attention_dim), "pooled": (width,), "time_ids": (6,)}


NETWORK: dict[str, object] = {  # of SDXL
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FAMILY = Family(
    name="sdxl",
    title="SDXL",
    pipelines=("StableDiffusionXLPipeline",),
    load=load,
    sample=sample,
    tiny=tiny,
    condition=condition,
    schedule="table",
    unet=True,
    cross_attention_tokens=77,
    student_schedulers=student_schedulers.of_table,
    no_guidance=sd.UNCONDITIONAL,
    call_options=call_options,
    lora_targets=sd.FAMILY.lora_targets,
    taps=("mid_block",),
    blocks=sd.FAMILY.blocks,
    models={
        "sdxl": Model(
            "stabilityai/stable-diffusion-xl-base-1.0",
            "StableDiffusionXLPipeline",
            "UNet2DConditionModel",
            NETWORK | {"sample_size": 128},
            sd.TABLE,
        ),
        "sdxl-turbo": Model(
            "stabilityai/sdxl-turbo",
            "StableDiffusionXLPipeline",
            "UNet2DConditionModel",
            NETWORK | {"sample_size": 64},
            sd.TABLE,
        ),
    },
)
