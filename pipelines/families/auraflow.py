"""AuraFlow: a flow transformer with two streams, then one; UMT5 text, zero after the prompt.

The positions are a learned table, so that the image has a largest side. Facts of v0.3: fal/AuraFlow-v0.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from pipelines import fields
from pipelines.components import Parts
from pipelines.families import latents, student_schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.protocols import Config, Pipeline

LENGTH = 256  # tokens of a prompt


@dataclass(frozen=True)
class Call(latents.TwoStreams):
    """c: "prompt_embeds" [B, 256, D], zero after the prompt."""

    def __call__(self, net: nn.Module, x: Tensor, n: Tensor, c: Condition) -> Tensor:
        assert c is not None
        return net(x, c["prompt_embeds"].to(x.dtype), n / 1000, return_dict=False)[0]


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    def encode(prompts: Sequence[str]) -> Condition:
        text = parts.text.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=parts.device)[0]
        return {"prompt_embeds": text}

    decode, latent = latents.kl(parts, latents.scale_only)
    denoiser = Denoiser(parts.net, *latents.flow(parts.scheduler()), call=Call())
    return Teacher(denoiser, encode, decode, latent, shape(parts, resolution), parts, FAMILY)


def shape(parts: Parts, resolution: int | None) -> tuple[int, int, int]:
    """(C, H, W) of a latent; 1024 pixels by default, as in the pipeline. ValueError above the table of positions."""
    config = parts.net.config
    pixels = latents.factor(parts) * config.patch_size
    largest = math.isqrt(config.pos_embed_max_size) * pixels
    resolution = resolution or fields.facts(parts.folder).get("resolution", 1024)
    if resolution > largest:
        raise ValueError(f"resolution is {resolution}; the positions of this teacher end at {largest}: ask for less")
    return latents.shape(parts, resolution, patch=config.patch_size)


def sample(
    pipe: Pipeline, prompts: Sequence[str], z: Tensor, steps: int, guidance: float, negative: str | None = None
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of the pipeline itself from unit noise z."""
    return latents.call_pipeline(pipe, prompts, z, steps, guidance_scale=guidance, negative_prompt=negative)


def tiny() -> Pipeline:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from pipelines.families import tiny

    net = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=14,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    tiny.amplify(net, 2.0, "norm1", "time_step_proj", "to_v", "to_out", "ff")
    tiny.amplify(net, 10.0, "context_embedder")
    texts = tiny.t5_tokenizer(LENGTH), tiny.t5(32, "UMT5")
    return AuraFlowPipeline(*texts, tiny.vae(scaling_factor=0.13025), net, FlowMatchEulerDiscreteScheduler(shift=1.73))


def condition(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the condition of one sample."""
    return {"prompt_embeds": (LENGTH, config.joint_attention_dim)}


FAMILY = Family(
    name="auraflow",
    title="AuraFlow",
    pipelines=("AuraFlowPipeline",),
    load=load,
    sample=sample,
    tiny=tiny,
    tiny_facts={"resolution": 16},  # the pipeline's default is 1024, whatever its network says
    condition=condition,
    student_schedulers=student_schedulers.of_flow,
    no_guidance=1.0,
    call_options=lambda parts, steps: {"guidance_scale": 1},
    lora_targets=(  # attention and feed-forward of both streams
        *latents.TwoStreams.projections,
        *(f"{ff}.{part}" for ff in ("ff", "ff_context") for part in ("linear_1", "linear_2", "out_projection")),
    ),
    taps=("single_transformer_blocks.13",),  # the middle of 4 + 32; its tokens are those of the text, then the image's
    blocks=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
    models={
        "auraflow": Model(
            "fal/AuraFlow-v0.3",
            "AuraFlowPipeline",
            "AuraFlowTransformer2DModel",
            {"pos_embed_max_size": 9216},
            scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 1.73}),
        )
    },
)
