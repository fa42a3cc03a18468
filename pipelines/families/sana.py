"""SANA: a linear-attention flow transformer on deep-compression latents, Gemma text. Also SANA-Sprint's variant.

SANA-Sprint (Chen et al. 2025, arXiv 2503.09641) normalises the queries and keys of its teacher, gives it t in [0, 1],
and fine-tunes it before the distillation (pipelines/export/sana_convert.py makes such a copy). sCM differentiates the
network in time: with input 1000 t the derivative is a thousand times as large. The student also takes a guidance scale,
by an embedding that is zero at first; 4.5 unless c has "guidance". It is a SanaSprintPipeline with the SCMScheduler.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.transition import FRESH
from distill.training.config import StudentConfig
from pipelines.components import Parts
from pipelines.families import latents, student_schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.protocols import Config, Network, Pipeline, Scheduler, config_of

UNCONDITIONAL = 1.0  # guidance_scale with which the pipeline makes one call per step
GUIDANCE = 4.5  # default guidance scale, as in SanaSprintPipeline
SPRINT_PIPELINE = "SanaSprintPipeline"
SPRINT = {"qk_norm": "rms_norm_across_heads", "timestep_scale": 1e-3}  # SANA-Sprint's config, except its guidance


def call(net: nn.Module, x: Tensor, n: Tensor, c: Condition) -> Tensor:
    """c: "prompt_embeds" [B, 300, D] and their "mask" [B, 300]; "guidance" [B] if the network takes it."""
    assert c is not None
    text = c["prompt_embeds"].to(x.dtype)
    w = None
    config = config_of(net)
    if config.guidance_embeds:
        w = c["guidance"].to(n) if "guidance" in c else torch.full_like(n, GUIDANCE)
        w = w * config.guidance_embeds_scale
    timesteps = n * config.timestep_scale
    return net(x, text, timesteps, guidance=w, encoder_attention_mask=c["mask"], return_dict=False)[0]


def with_guidance_embedding(net: Network, parts: Parts) -> Network:
    """The network with a guidance embedding. Its last layer is zero, so that the output does not change yet."""
    if net.config.guidance_embeds:
        return net
    if abs(net.config.timestep_scale / SPRINT["timestep_scale"] - 1) > 1e-6:
        raise ValueError(
            "SanaSprintPipeline gives its network t in [0, 1], and this teacher expects 1000 t: convert it with "
            "python -m pipelines.sana TEACHER FOLDER, and fine-tune that with recipes/sana_sprint_teacher.py"
        )
    made = with_config(net, guidance_embeds=True)
    for p in made.get_submodule("time_embed.guidance_embedder.linear_2").parameters():
        torch.nn.init.zeros_(p)
    return made


def with_config(net: nn.Module, **config: object) -> Network:
    """The network with another config and the same weights. New norms start as ones."""
    like = next(net.parameters())
    own = {key: v for key, v in config_of(net).items() if not key.startswith("_")}
    with torch.random.fork_rng(), torch.device(like.device):
        torch.manual_seed(0)  # the same new weights on every process
        made = cast(Network, type(net)(**own | config).to(like.dtype))
    plain = {name.replace("time_embed.emb.", "time_embed."): p for name, p in net.state_dict().items()}
    names = {name.replace("time_embed.emb.", "time_embed."): name for name in made.state_dict()}
    made.load_state_dict({names[name]: p for name, p in plain.items()}, strict=False, assign=like.is_meta)
    return made


def is_sprint(parts: Parts) -> bool:
    """Whether the pipeline is SANA-Sprint's."""
    return parts.index["_class_name"] == SPRINT_PIPELINE


def verified_steps(parts: Parts) -> tuple[int, ...]:
    """Numbers of calls to verify beside the student's own: SANA-Sprint's student works with all of them."""
    return (1, 2, 4) if is_sprint(parts) else ()


def angles(steps: int) -> tuple[float, ...]:
    """TrigFlow's angles of SanaSprintPipeline's calls: pi / 2 and 1.3 for two calls, else evenly spaced from pi / 2.

    It supports no others: its `timesteps` raise an error with diffusers' SCMScheduler, so the paper's four are not
    available.
    """
    return (math.pi / 2, 1.3) if steps == 2 else tuple(math.pi / 2 * (1 - i / steps) for i in range(steps))


def call_times(scheduler: Scheduler, steps: int) -> tuple[float, ...] | None:
    """The times of the calls under SANA-Sprint's scheduler, which does not store them. None for another scheduler."""
    if type(scheduler).__name__ != "SCMScheduler":
        return None
    angle = torch.tensor(angles(steps), dtype=torch.float64)
    return tuple((angle.sin() / (angle.sin() + angle.cos())).tolist())


def schedulers_of_student(teacher: Teacher, student: StudentConfig) -> Iterator[Scheduler]:
    """The scheduler of SANA-Sprint for its pipeline; else the schedulers of flows."""
    if not is_sprint(teacher.parts):
        yield from student_schedulers.of_flow(teacher, student)
        return
    from diffusers import SCMScheduler

    if student.scale is not None and abs(student.scale - 1) > 1e-6:
        raise ValueError(f"SANA-Sprint's pipeline feeds unit noise, not noise scaled by {student.scale}")
    if student.steps > 1 and student.transition is not FRESH:
        raise ValueError("SANA-Sprint's pipeline renoises with fresh noise: train with --student.renoise fresh")
    if student.first_time(teacher.denoiser.schedule) < 1:
        raise ValueError("SANA-Sprint's pipeline starts at noise alone: leave --student.sigma and timestep out")
    yield SCMScheduler()


def call_options(parts: Parts, steps: int) -> dict[str, object]:
    """Arguments of the call in the model card."""
    if not is_sprint(parts):
        return {"guidance_scale": 1, "use_resolution_binning": False}
    options: dict[str, object] = {"guidance_scale": GUIDANCE, "use_resolution_binning": False}
    return options if steps == 2 else options | {"intermediate_timesteps": None}


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    def embed(prompts: Sequence[str], instruction: list[str] | None) -> Condition:
        options: dict[str, object] = {"device": parts.device, "complex_human_instruction": instruction}
        options |= {} if is_sprint(parts) else {"do_classifier_free_guidance": False}
        text, mask, *_ = parts.text.encode_prompt(list(prompts), **options)
        return {"prompt_embeds": text, "mask": mask}

    def encode(prompts: Sequence[str]) -> Condition:
        defaults = inspect.signature(type(parts.text).__call__).parameters
        return embed(prompts, defaults["complex_human_instruction"].default)

    def negative(prompts: Sequence[str]) -> Condition:
        return embed(prompts, None)  # the pipeline adds its instruction to prompts only

    decode, latent = latents.dc(parts)
    denoiser = Denoiser(parts.net, *latents.flow(parts.scheduler()), call=call)
    shape = latents.shape(parts, resolution, parts.net.config.patch_size)
    return Teacher(denoiser, encode, decode, latent, shape, parts, FAMILY, negative)


def sample(
    pipe: Pipeline, prompts: Sequence[str], z: Tensor, steps: int, guidance: float, negative: str | None = None
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of the pipeline itself from unit noise z."""
    options: dict[str, object] = {"guidance_scale": guidance, "use_resolution_binning": False}
    if hasattr(pipe.scheduler.config, "sigma_data"):  # SANA-Sprint's: one call per step with any guidance
        options["guidance_scale"] = GUIDANCE if guidance == UNCONDITIONAL else guidance
        if steps != 2:
            options["intermediate_timesteps"] = None
    else:
        options["negative_prompt"] = negative or ""
    return latents.call_pipeline(pipe, prompts, z, steps, **options)


def tiny(**config: object) -> Pipeline:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    from pipelines.families import tiny

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
        num_layers=20,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        **(SPRINT | config),
    )
    tiny.amplify(net, 3.0, "attn2", "timestep_embedder")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return SanaPipeline(tiny.gemma_tokenizer(), tiny.gemma(16), vae, net, DPMSolverMultistepScheduler(**flow))


def condition(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the condition of one sample."""
    return {"prompt_embeds": (300, config.caption_channels), "mask": (300,)}


# SANA's autoencoder: factor 32.
DC: dict[str, object] = {"encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024)}
FAMILY = Family(
    name="sana",
    title="SANA",
    pipelines=("SanaPipeline", SPRINT_PIPELINE),
    load=load,
    sample=sample,
    tiny=tiny,
    condition=condition,
    guidance_embedding=True,
    cross_attention_tokens=300,
    with_guidance_embedding=with_guidance_embedding,
    embedded_index={"_class_name": SPRINT_PIPELINE},
    student_schedulers=schedulers_of_student,
    call_times=call_times,
    call_options=call_options,
    verified_steps=verified_steps,
    no_guidance=UNCONDITIONAL,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"),
    taps=("transformer_blocks.9",),  # the middle of 20
    blocks=("SanaTransformerBlock",),
    models={
        "sana": Model(
            "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "SanaPipeline", "SanaTransformer2DModel", vae=DC
        ),
        "sana600m": Model(
            "Efficient-Large-Model/Sana_600M_512px_diffusers",
            "SanaPipeline",
            "SanaTransformer2DModel",
            {
                "num_attention_heads": 36,
                "num_cross_attention_heads": 16,
                "cross_attention_head_dim": 72,
                "num_layers": 28,
                "cross_attention_dim": 1152,
                "sample_size": 16,
            },
            vae=DC,
        ),
        "sprint": Model(
            "Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers",
            "SanaPipeline",
            "SanaTransformer2DModel",
            {"qk_norm": "rms_norm_across_heads", "timestep_scale": 1e-3},
            vae=DC,
        ),
    },
)
