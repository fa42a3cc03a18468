"""Stable Diffusion XL: SD's UNet told two texts, a pooled embedding and the sizes of the image; no prompt is zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.diffusion.denoiser import Condition, Denoiser
from pipelines.components import Parts
from pipelines.families import latents, schedulers, sd
from pipelines.teacher import Teacher

UNCONDITIONAL = 0.0  # guidance_scale of the pipeline that makes one call a step
CALL: dict[str, Any] = {"guidance_scale": 0}  # options of the call that a model card shows
GUIDANCE = 5.0  # default input of a guidance embedding, as in the pipeline
TARGETS = sd.TARGETS  # modules of a LoRA
TAPS = ("mid_block",)  # modules whose output is a discriminator's feature
BLOCKS = sd.BLOCKS  # classes of modules that are sharded one by one
LENGTH = 77  # tokens of a prompt


def call(net: Any, x: Tensor, n: Tensor, c: Condition) -> Tensor:
    """c: "prompt_embeds" [B, 77, D], "pooled" [B, P], "time_ids" [B, 6]: original size, crop, target size, in pixels.

    A network with a guidance embedding also reads "guidance" w [B], as in SD.
    """
    assert c is not None
    told = sd.guidance(net, x, c, GUIDANCE)
    added = {"text_embeds": c["pooled"].to(x.dtype), "time_ids": c["time_ids"]}
    text = c["prompt_embeds"].to(x.dtype)
    return net(x, n, text, timestep_cond=told, added_cond_kwargs=added, return_dict=False)[0]


def options(parts: Parts, steps: int) -> dict[str, Any]:
    """Arguments of the call in the model card."""
    return {"guidance_scale": GUIDANCE} if sd.has_guidance_embedding(parts.net) else CALL


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    shape = latents.shape(parts, resolution)
    side = float(shape[-1] * latents.factor(parts))

    def encode(prompts: Sequence[str]) -> Condition:
        text, _, pooled, _ = parts.text.encode_prompt(list(prompts), None, parts.device, 1, False)
        sizes = torch.tensor([side, side, 0, 0, side, side]).expand(len(prompts), 6).to(text.device)
        return {"prompt_embeds": text, "pooled": pooled, "time_ids": sizes}

    decode, latent = latents.kl(parts, latents.channel_scale_and_shift)
    denoiser = Denoiser(parts.net, *schedulers.table(parts.scheduler()), call=call)
    if parts.index.get("force_zeros_for_empty_prompt", True):  # without the sizes: they stay those of the image
        config = parts.net.config
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        text = torch.zeros(1, LENGTH, config.cross_attention_dim)
        denoiser.null = {"prompt_embeds": text, "pooled": torch.zeros(1, width)}
    return Teacher(denoiser, encode, decode, latent, shape, parts)


def sample(
    pipe: Any, prompts: Sequence[str], z: Tensor, steps: int, guidance: float, negative: str | None = None
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of the pipeline itself from unit noise z."""
    many = None if negative is None else [negative] * len(prompts)
    guidance = GUIDANCE if sd.has_guidance_embedding(pipe.unet) and guidance == UNCONDITIONAL else guidance
    height, width = (side * pipe.vae_scale_factor for side in z.shape[-2:])
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
    return pipe(list(prompts), negative_prompt=many, latents=z, output_type="pt", **options).images


def tiny() -> Any:
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
    tiny.louder(tiny.louder(net, 4.0, "add_embedding"), 2.5, "conv_out")
    encoders = tiny.clip(), tiny.clip(projection=32), tiny.clip_tokenizer(), tiny.clip_tokenizer()
    return StableDiffusionXLPipeline(tiny.vae(scaling_factor=0.13025), *encoders, net, scheduler, add_watermarker=False)
