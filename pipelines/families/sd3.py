"""Stable Diffusion 3 and 3.5: a flow transformer with two streams; two CLIP texts, and T5 if the folder has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from pipelines.components import Parts
from pipelines.families import latents, student_schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.protocols import Config, Pipeline


@dataclass(frozen=True)
class Call(latents.TwoStreams):
    """c: "prompt_embeds" [B, 77 + 256, D], "pooled" [B, P]."""

    def __call__(self, net: nn.Module, x: Tensor, n: Tensor, c: Condition) -> Tensor:
        assert c is not None
        return net(x, c["prompt_embeds"].to(x.dtype), c["pooled"].to(x.dtype), n, return_dict=False)[0]


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    def encode(prompts: Sequence[str]) -> Condition:
        text = parts.text
        if text.text_encoder_3 is None:
            text.transformer = parts.net  # T5's part is zeros of the width that the network expects
        embeds, _, pooled, _ = text.encode_prompt(list(prompts), None, None, parts.device, 1, False)
        return {"prompt_embeds": embeds, "pooled": pooled}

    decode, latent = latents.kl(parts, latents.scale_and_shift)
    denoiser = Denoiser(parts.net, *latents.flow(parts.scheduler()), call=Call())
    shape = latents.shape(parts, resolution, patch=parts.net.config.patch_size)
    return Teacher(denoiser, encode, decode, latent, shape, parts, FAMILY)


def sample(
    pipe: Pipeline, prompts: Sequence[str], z: Tensor, steps: int, guidance: float, negative: str | None = None
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of the pipeline itself from unit noise z."""
    many = None if negative is None else [negative] * len(prompts)
    return latents.call_pipeline(pipe, prompts, z, steps, guidance_scale=guidance, negative_prompt=many)


def tiny(t5: bool = True) -> Pipeline:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    from pipelines.families import tiny

    net = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=14,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    tiny.amplify(net, 4.0, "time_text_embed.text_embedder", "context_embedder", "proj_out")
    vae = tiny.vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    clips = [(tiny.clip(projection=32), tiny.clip_tokenizer()) for _ in range(2)]
    last = (tiny.t5(64), tiny.t5_tokenizer(256)) if t5 else (None, None)
    return StableDiffusion3Pipeline(net, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, *clips[0], *clips[1], *last)


def condition(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the condition of one sample."""
    return {"prompt_embeds": (333, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}


FAMILY = Family(
    name="sd3",
    title="SD 3, 3.5",
    pipelines=("StableDiffusion3Pipeline",),
    load=load,
    sample=sample,
    tiny=tiny,
    condition=condition,
    student_schedulers=student_schedulers.of_flow,
    no_guidance=1.0,
    call_options=lambda parts, steps: {"guidance_scale": 1},
    lora_targets=(  # attention and feed-forward of both streams
        *latents.TwoStreams.projections,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    taps=("transformer_blocks.12",),  # the middle of 24
    blocks=("JointTransformerBlock",),
    models={
        "sd3": Model(
            "stabilityai/stable-diffusion-3-medium-diffusers",
            "StableDiffusion3Pipeline",
            "SD3Transformer2DModel",
            {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        ),
        "sd35": Model(
            "stabilityai/stable-diffusion-3.5-large",
            "StableDiffusion3Pipeline",
            "SD3Transformer2DModel",
            {
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
        ),
        "sd35-medium": Model(
            "stabilityai/stable-diffusion-3.5-medium",
            "StableDiffusion3Pipeline",
            "SD3Transformer2DModel",
            {
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "pos_embed_max_size": 384,
                "qk_norm": "rms_norm",
                "dual_attention_layers": tuple(range(13)),
            },
        ),
    },
)
