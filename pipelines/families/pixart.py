"""PixArt-alpha and PixArt-Sigma: a diffusion transformer on latents of a KL autoencoder, masked T5 text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from pipelines.components import Parts
from pipelines.families import latents, schedulers, student_schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.protocols import Config, Pipeline

LENGTH = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # tokens of a prompt


def call(net: nn.Module, x: Tensor, n: Tensor, c: Condition) -> Tensor:
    """c: "prompt_embeds" [B, L, D] and their "mask" [B, L].

    PixArt-alpha at 1024 pixels reads two more keys: "resolution" [B, 2], height and width in pixels, and "aspect_ratio"
    [B, 1], height / width. The last C of the 2C output channels are a learned variance, which no sampler of the
    pipelines uses.
    """
    assert c is not None
    added = {key: c[key].to(x.dtype) if key in c else None for key in ("resolution", "aspect_ratio")}
    text = c["prompt_embeds"].to(x.dtype)
    return net(x, text, n, added, encoder_attention_mask=c["mask"], return_dict=False)[0][:, : x.shape[1]]


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    shape = latents.shape(parts, resolution, parts.net.config.patch_size)
    side = float(shape[-1] * latents.factor(parts))
    length = LENGTH[parts.index["_class_name"]]

    def encode(prompts: Sequence[str]) -> Condition:
        options = {"clean_caption": False, "max_sequence_length": length, "device": parts.device}
        text, mask, *_ = parts.text.encode_prompt(list(prompts), False, **options)
        c = {"prompt_embeds": text, "mask": mask}
        if parts.net.use_additional_conditions:
            c["resolution"] = torch.full((len(text), 2), side, device=text.device)
            c["aspect_ratio"] = torch.ones(len(text), 1, device=text.device)
        return c

    decode, latent = latents.kl(parts, latents.scale_only)
    denoiser = Denoiser(parts.net, *schedulers.table(parts.scheduler()), call=call)
    return Teacher(denoiser, encode, decode, latent, shape, parts, FAMILY)


def sample(
    pipe: Pipeline, prompts: Sequence[str], z: Tensor, steps: int, guidance: float, negative: str | None = None
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of the pipeline itself from unit noise z."""
    plain = {"clean_caption": False, "use_resolution_binning": False, "negative_prompt": negative or ""}
    return latents.call_pipeline(pipe, prompts, z, steps, guidance_scale=guidance, **plain)


def tiny(kind: str = "PixArtSigmaPipeline", **config: object) -> Pipeline:
    """A tiny pipeline of either kind. PixArt-alpha with sample_size 128 has its added conditions."""
    import diffusers

    from pipelines.families import tiny

    base: dict[str, object] = {
        "sample_size": 8,
        "num_layers": 14,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 32,
    }
    net = tiny.amplify(diffusers.PixArtTransformer2DModel(**base | config), 3.0, "attn2")
    tiny.amplify(tiny.amplify(net, 1.5, "resolution_embedder"), 4.0, "aspect_ratio_embedder")
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    vae = tiny.amplify(tiny.vae(), 2.0, "conv_out")
    return getattr(diffusers, kind)(tiny.t5_tokenizer(), tiny.t5(), vae, net, scheduler)


def condition(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the condition of one sample."""
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (300, config.caption_channels), "mask": (300,)}
    added = config.use_additional_conditions
    if added or (added is None and config.sample_size == 128):  # PixArt-alpha at 1024 pixels
        shapes |= {"resolution": (2,), "aspect_ratio": (1,)}
    return shapes


FAMILY = Family(
    name="pixart",
    title="PixArt",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    load=load,
    sample=sample,
    tiny=tiny,
    condition=condition,
    schedule="table",
    cross_attention_tokens=300,
    student_schedulers=student_schedulers.of_table,
    no_guidance=1.0,
    call_options=lambda parts, steps: {
        "guidance_scale": 1,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    taps=("transformer_blocks.13",),  # the middle of 28
    blocks=("BasicTransformerBlock",),
    models={
        "pixart": Model(
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
            "PixArtSigmaPipeline",
            "PixArtTransformer2DModel",
            {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
            ("DPMSolverMultistepScheduler", {"beta_start": 0.0001, "beta_end": 0.02}),
        ),
        "pixart-alpha": Model(
            "PixArt-alpha/PixArt-XL-2-1024-MS",
            "PixArtAlphaPipeline",
            "PixArtTransformer2DModel",
            {"sample_size": 128, "caption_channels": 4096},
            ("DPMSolverMultistepScheduler", {"beta_start": 0.0001, "beta_end": 0.02}),
        ),
    },
)
