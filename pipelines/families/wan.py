"""Wan 2.1 and 2.2 text-to-video: a flow transformer on latents (C, T, H, W) of a causal 3-D autoencoder, UMT5 text.

The pipeline takes neither timesteps nor sigmas as arguments, so a student's times are those of its scheduler's config.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from pipelines import fields
from pipelines.components import Parts
from pipelines.families import latents, student_schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.protocols import Config, Pipeline

LENGTH = 512  # tokens of a prompt
SIZES = {480: (480, 832), 704: (704, 1280), 720: (720, 1280)}  # resolution -> height, width; others are square


def call(net: nn.Module, x: Tensor, n: Tensor, c: Condition) -> Tensor:
    """x [B, C, T, H, W]; c: "prompt_embeds" [B, 512, D], zero after the prompt."""
    assert c is not None
    return net(x, n, c["prompt_embeds"].to(x.dtype), return_dict=False)[0]


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    student = fields.facts(parts.folder).get("student")
    two = parts.index.get("boundary_ratio") is not None or parts.index.get("transformer_2", [None])[0] is not None
    if two and not student:
        raise ValueError(
            f"{parts.folder} holds two experts, transformer and transformer_2 (Wan 2.2 A14B): one student cannot start "
            "from both. Teachers with one transformer are Wan 2.1 (1.3B, 14B) and Wan 2.2 TI2V-5B"
        )

    def encode(prompts: Sequence[str]) -> Condition:
        options = {"max_sequence_length": LENGTH, "device": parts.device}
        text, _ = parts.text.encode_prompt(list(prompts), None, False, **options)
        return {"prompt_embeds": text}

    decode, latent = latents.kl3d(parts)
    denoiser = Denoiser(parts.net, *latents.flow(parts.scheduler()), call=call)
    return Teacher(denoiser, encode, decode, latent, shape(parts, resolution, frames), parts, FAMILY)


def shape(parts: Parts, resolution: int | None, frames: int | None) -> tuple[int, int, int, int]:
    """(C, T, H, W) of a latent. Default: 81 frames of 480p; Wan 2.2 TI2V-5B: 121 frames of 704p."""
    config = parts.net.config
    vae = parts.config("vae")
    space = vae.get("scale_factor_spatial", 8)
    time = vae.get("scale_factor_temporal", 4)
    facts = {"resolution": 704, "frames": 121} if space == 16 else {"resolution": 480, "frames": 81}
    facts |= fields.facts(parts.folder)
    resolution = facts["resolution"] if resolution is None else resolution
    frames = facts["frames"] if frames is None else frames
    parts.asked = {"resolution": resolution, "frames": frames}  # no component of the pipeline stores it
    height, width = SIZES.get(resolution, (resolution, resolution))
    pixels = space * config.patch_size[1]
    if height % pixels or width % pixels:
        raise ValueError(f"resolution is {resolution}; it must be one of {sorted(SIZES)} or a multiple of {pixels}")
    if frames % time != 1:
        raise ValueError(f"frames is {frames}; this autoencoder needs a multiple of {time} plus 1")
    return config.in_channels, frames // time + 1, height // space, width // space


def sample(
    pipe: Pipeline, prompts: Sequence[str], z: Tensor, steps: int, guidance: float, negative: str | None = None
) -> Tensor:
    """Videos [B, 3, T, H, W] in [0, 1] of the pipeline itself from unit noise z."""
    height, width = (side * pipe.vae_scale_factor_spatial for side in z.shape[-2:])
    frames = (z.shape[2] - 1) * pipe.vae_scale_factor_temporal + 1
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "num_frames": frames, "output_type": "pt"}
    many = None if negative is None else [negative] * len(prompts)
    return pipe(list(prompts), many, height, width, latents=z, **options).frames.transpose(1, 2)


def tiny(**config: object) -> Pipeline:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    from pipelines.families import tiny

    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    net = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=15,
        rope_max_seq_len=32,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    tiny.amplify(net, 3.0, "text_embedder", "attn2.norm_k", "attn2.to_v", "attn2.to_out")
    tiny.amplify(vae, 3.0, "conv_out")
    parts = tiny.t5_tokenizer(), tiny.t5(kind="UMT5"), vae, UniPCMultistepScheduler(**flow), net
    return WanPipeline(*parts, **config)


def condition(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the condition of one sample."""
    return {"prompt_embeds": (LENGTH, config.text_dim)}


FAMILY = Family(
    name="wan",
    title="Wan 2.1, Wan 2.2 TI2V-5B",
    pipelines=("WanPipeline",),
    task="text-to-video",
    load=load,
    sample=sample,
    tiny=tiny,
    tiny_facts={"resolution": 32, "frames": 5},  # no component of a Wan pipeline stores its size
    condition=condition,
    flow_shift=5.0,  # LightX2V
    cross_attention_tokens=LENGTH,
    student_schedulers=student_schedulers.of_flow,
    no_guidance=1.0,
    call_options=lambda parts, steps: {"guidance_scale": 1},
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    taps=("blocks.14",),  # the middle of 30
    blocks=("WanTransformerBlock",),
    models={
        "wan": Model(
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "WanPipeline",
            "WanTransformer3DModel",
            {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
        ),
        "wan14b": Model("Wan-AI/Wan2.1-T2V-14B-Diffusers", "WanPipeline", "WanTransformer3DModel"),
        "wan22-5b": Model(
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            "WanPipeline",
            "WanTransformer3DModel",
            {
                "num_layers": 30,
                "num_attention_heads": 24,
                "ffn_dim": 14336,
                "in_channels": 48,
                "out_channels": 48,
            },
            vae={"scale_factor_spatial": 16, "scale_factor_temporal": 4},
        ),
    },
)
