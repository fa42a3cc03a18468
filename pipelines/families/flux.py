"""FLUX.1 dev and schnell: a flow transformer on 2x2 packed latents; T5 tokens and a pooled CLIP text.

dev takes a guidance scale as an input: 3.5 unless c has "guidance". The guidance of Teacher.sample and of distill is
classifier-free guidance in addition, `true_cfg_scale` in the pipeline, with the empty prompt as the null condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from pipelines import fields
from pipelines.components import Parts
from pipelines.families import latents, student_schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.protocols import Config, Pipeline, Scheduler, config_of


@dataclass(frozen=True)
class Call(latents.TwoStreams):
    """c: "prompt_embeds" [B, 512, D], "pooled" [B, P]; "guidance" [B] replaces the field's if the network takes it."""

    guidance: float = 3.5

    def __call__(self, net: nn.Module, x: Tensor, n: Tensor, c: Condition) -> Tensor:
        assert c is not None
        B, _, H, W = x.shape
        text = c["prompt_embeds"].to(x.dtype)
        guidance = None
        if config_of(net).guidance_embeds:
            guidance = c["guidance"].to(n) if "guidance" in c else torch.full_like(n, self.guidance)
        places = torch.cartesian_prod(
            *(torch.arange(n, device=x.device) for n in (1, H // 2, W // 2))
        ).float()  # [N, 3]
        ids = {"img_ids": places, "txt_ids": places.new_zeros(text.shape[1], 3)}
        out = net(pack(x), text, c["pooled"].to(x.dtype), n / 1000, guidance=guidance, **ids, return_dict=False)[0]
        return unpack(out, x.shape)


def pack(x: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens [B, H/2 W/2, 4C]."""
    B, C, H, W = x.shape
    return x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 4 * C)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`."""
    B, C, H, W = shape
    return tokens.reshape(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def draw_noise(shape: Sequence[int]) -> Tensor:
    """Noise [B, C, H, W] as the pipeline's scheduler draws it: over packed tokens, from torch's generator."""
    B, C, H, W = shape
    return unpack(torch.randn(B, H * W // 4, 4 * C), shape)


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    def encode(prompts: Sequence[str]) -> Condition:
        text, pooled, _ = parts.text.encode_prompt(list(prompts), device=parts.device)
        return {"prompt_embeds": text, "pooled": pooled}

    decode, latent = latents.kl(parts, latents.scale_and_shift)
    denoiser = Denoiser(parts.net, *latents.flow(parts.scheduler()), call=Call())
    return Teacher(denoiser, encode, decode, latent, shape(parts, resolution), parts, FAMILY)


def shape(parts: Parts, resolution: int | None) -> tuple[int, int, int]:
    """(C, H, W) of an draw_noise latent; 1024 pixels by default."""
    facts = fields.facts(parts.folder)
    channels, height, width = latents.shape(parts, resolution or facts.get("resolution", 1024), patch=2)
    return channels // 4, height, width


def set_timesteps(scheduler: Scheduler, steps: int, teacher: Teacher) -> None:
    """Levels of the pipeline, from 1 to 1 / steps. With dynamic shifting, mu is linear in the number of tokens."""
    config = scheduler.config
    tokens = teacher.shape[-1] * teacher.shape[-2] / 4
    few = config.get("base_image_seq_len", 256)
    many = config.get("max_image_seq_len", 4096)
    low = config.get("base_shift", 0.5)
    high = config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)


def sample(
    pipe: Pipeline, prompts: Sequence[str], z: Tensor, steps: int, guidance: float, negative: str | None = None
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of the pipeline itself from unit noise z, with true guidance of that scale."""
    many = [negative or ""] * len(prompts) if guidance > 1 else None
    options = {"true_cfg_scale": guidance, "negative_prompt": many}
    return latents.call_pipeline(pipe, prompts, z, steps, latents=pack(z), **options)


def tiny(guidance: bool = True) -> Pipeline:
    """A tiny FLUX.1-dev, or schnell without a guidance embedding."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from pipelines.families import tiny

    net = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=10,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    tiny.amplify(tiny.amplify(net, 4.0, "context_embedder", "proj_out"), 2.0, "time_text_embed")
    vae = tiny.vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    flow = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance, max_shift=1.15
    )
    texts = tiny.clip(), tiny.clip_tokenizer(), tiny.t5(), tiny.t5_tokenizer(512)
    return FluxPipeline(flow, vae, *texts, net)


def condition(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the condition of one sample."""
    return {"prompt_embeds": (512, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}


FAMILY = Family(
    name="flux",
    title="FLUX.1",
    pipelines=("FluxPipeline",),
    load=load,
    sample=sample,
    tiny=tiny,
    tiny_facts={"resolution": 16},  # no component of the pipeline stores its size
    condition=condition,
    set_timesteps=set_timesteps,
    draw_noise=draw_noise,
    student_schedulers=student_schedulers.of_flow,
    no_guidance=1.0,
    guidance_embedding=True,
    lora_targets=(  # attention and feed-forward of both streams
        *latents.TwoStreams.projections,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    ),
    taps=("single_transformer_blocks.9",),  # the middle of 19 + 38
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    models={
        "flux": Model(
            "black-forest-labs/FLUX.1-dev", "FluxPipeline", "FluxTransformer2DModel", {"guidance_embeds": True}
        ),
        "flux-schnell": Model("black-forest-labs/FLUX.1-schnell", "FluxPipeline", "FluxTransformer2DModel"),
    },
)
