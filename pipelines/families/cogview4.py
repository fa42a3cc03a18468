"""CogView4: a flow transformer with two streams; GLM text, padded on the left to a multiple of 16, without a mask.

A prompt's padding is read like its words, and the pipeline pads a batch to its longest prompt. c holds prompts that
were encoded one by one, and the mask of diffusers' training processor hides the rest of its fixed length. So the
pipeline gives a prompt the same image alone or beside prompts of the same padded length.

The pipeline shifts the levels of noise and tells the network the timesteps before the shift. Its own timesteps end at
1, which would waste the last call of a student. A student's call names its timesteps, and its scheduler has the
teacher's shift at the student's size as a fixed shift: use_dynamic_shifting tells a teacher from a student.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distill.diffusion.denoiser import Condition, Denoiser
from distill.training.config import StudentConfig
from pipelines import fields
from pipelines.components import Parts
from pipelines.families import latents, student_schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.protocols import Config, Pipeline, Scheduler

LENGTH = 512  # largest number of tokens of a prompt; the pipeline would take 1024, which costs twice the memory
PATCH = 2


@dataclass(frozen=True)
class Shift:
    """The shift of the levels of noise: low + high sqrt(tokens / few), for the tokens of an image."""

    low: float
    high: float
    few: int

    @classmethod
    def from_scheduler(cls, scheduler: Scheduler) -> Shift:
        """As the pipeline reads it from its scheduler."""
        read = scheduler.config.get
        return cls(read("base_shift", 0.25), read("max_shift", 0.75), read("base_image_seq_len", 256))

    def for_size(self, height: int, width: int) -> float:
        """The shift for a latent of that size."""
        return self.low + self.high * (height * width / PATCH**2 / self.few) ** 0.5


@dataclass(frozen=True)
class Call:
    """c: "prompt_embeds" [B, 512, D] and their "mask" [B, 512], 1 for a token. factor: pixels for one of a latent."""

    shift: Shift
    factor: int

    def __call__(self, net: nn.Module, x: Tensor, n: Tensor, c: Condition) -> Tensor:
        assert c is not None
        height, width = x.shape[-2:]
        shift = self.shift.for_size(height, width)
        told = n / (shift + (1 - shift) * n / 1000)
        size = x.new_tensor([height * self.factor, width * self.factor]).expand(len(x), 2)
        options = {"attention_kwargs": {"text_attn_mask": c["mask"].int()}, "return_dict": False}
        return net(x, c["prompt_embeds"].to(x.dtype), told, size, size, torch.zeros_like(size), **options)[0]


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_cogview4 import CogView4TrainingAttnProcessor

    scheduler = parts.scheduler()
    if not scheduler.config.get("use_dynamic_shifting") and not fields.facts(parts.folder).get("student"):
        raise ValueError(
            f"{parts.folder}: use_dynamic_shifting of its scheduler is false, which only a student's is: set it true"
        )

    def encode(prompts: Sequence[str]) -> Condition:
        options = {"device": parts.device, "max_sequence_length": LENGTH}
        texts = [parts.text.encode_prompt([p], None, False, **options)[0][0] for p in prompts]
        masks = [text.new_ones(len(text), dtype=torch.long) for text in texts]
        return {
            "prompt_embeds": torch.stack([pad(text, (0, 0, 0, LENGTH - len(text))) for text in texts]),
            "mask": torch.stack([pad(mask, (0, LENGTH - len(mask))) for mask in masks]),
        }

    for module in parts.net.modules():
        if isinstance(module, Attention):
            module.set_processor(CogView4TrainingAttnProcessor())  # without a mask it gives what the pipeline's gives
    decode, latent = latents.kl(parts, latents.scale_only)
    call = Call(Shift.from_scheduler(scheduler), latents.factor(parts))
    denoiser = Denoiser(parts.net, *latents.flow(scheduler), call=call)
    return Teacher(denoiser, encode, decode, latent, latents.shape(parts, resolution, PATCH), parts, FAMILY)


def even_timesteps(steps: int) -> list[int]:
    """The timesteps, before the shift, of a student's calls."""
    return [1000 * (steps - i) // steps for i in range(steps)]


def set_timesteps(scheduler: Scheduler, steps: int, teacher: Teacher) -> None:
    """Levels of the pipeline; even ones for a student."""
    if not scheduler.config.get("use_dynamic_shifting"):
        scheduler.set_timesteps(sigmas=np.array(even_timesteps(steps)) / 1000)
        return
    shift = Shift.from_scheduler(scheduler).for_size(*teacher.shape[-2:])
    scheduler.set_timesteps(sigmas=np.linspace(1000, 1, steps).astype(np.int64) / 1000, mu=shift)


def schedulers_of_student(teacher: Teacher, student: StudentConfig) -> Iterator[Scheduler]:
    """The scheduler of even timesteps, with the shift by which the network is told the level of its noise."""
    first = next(iter(student_schedulers.of_flow(teacher, student)))
    shift = Shift.from_scheduler(teacher.parts.scheduler())
    ends = {"base_shift": shift.low, "max_shift": shift.high, "base_image_seq_len": shift.few}
    yield type(first).from_config(first.config, shift=shift.for_size(*teacher.shape[-2:]), shift_terminal=None, **ends)


def call_options(parts: Parts, steps: int) -> dict[str, object]:
    """Arguments of the call in the model card."""
    return {"guidance_scale": 1, "timesteps": even_timesteps(steps), "max_sequence_length": LENGTH}


def sample(
    pipe: Pipeline, prompts: Sequence[str], z: Tensor, steps: int, guidance: float, negative: str | None = None
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of the pipeline itself from unit noise z."""
    options: dict[str, object] = {"negative_prompt": negative, "max_sequence_length": LENGTH}
    if not pipe.scheduler.config.get("use_dynamic_shifting"):
        options["timesteps"] = even_timesteps(steps)
    return latents.call_pipeline(pipe, prompts, z, steps, guidance_scale=guidance, **options)


def tiny() -> Pipeline:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler

    from pipelines.families import tiny

    net = CogView4Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=14,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=32,
        condition_dim=16,
    )
    tiny.amplify(net, 2.0, "norm1", "to_v", "to_out", "time_condition_embed", "proj_out")
    tiny.amplify(net, 150.0, "text_proj.weight")  # not its bias, which would drown the prompts
    vae = tiny.vae(scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False)
    flow = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75}
    return CogView4Pipeline(tiny.glm_tokenizer(), tiny.glm(), vae, net, FlowMatchEulerDiscreteScheduler(**flow))


def condition(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the condition of one sample."""
    return {"prompt_embeds": (LENGTH, config.text_embed_dim), "mask": (LENGTH,)}


FAMILY = Family(
    name="cogview4",
    title="CogView4",
    pipelines=("CogView4Pipeline",),
    load=load,
    sample=sample,
    tiny=tiny,
    condition=condition,
    set_timesteps=set_timesteps,
    pads_to_longest=True,
    student_schedulers=schedulers_of_student,
    no_guidance=1.0,
    call_options=call_options,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),  # shared by both streams
    taps=("transformer_blocks.13",),  # the middle of 28
    blocks=("CogView4TransformerBlock",),
    models={
        "cogview4": Model(
            "THUDM/CogView4-6B",
            "CogView4Pipeline",
            "CogView4Transformer2DModel",
            {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32},
            scheduler=(
                "FlowMatchEulerDiscreteScheduler",
                {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75},
            ),
            vae={"block_out_channels": (128, 512, 1024, 1024), "latent_channels": 16},
        )
    },
)
