"""Pixel-space, class-conditional EDM teachers and students: a UNet2DModel in diffusers' ConsistencyModelPipeline.

The scheduler's config carries sigma_data and the range of sigma. With sigma_min = 0 its step is exactly EDM's
preconditioning D = c_skip x + c_out F(c_in x, 250 ln sigma); the network is trained with that c_noise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill.denoiser import Condition, Denoiser
from distill.schedule import EDM, expand
from pipelines import Teacher

if TYPE_CHECKING:
    from diffusers import ConsistencyModelPipeline, UNet2DModel

    from distill.student import Student

RHO = 7.0


@dataclass(frozen=True)
class Call:
    """How a UNet2DModel is called: c_in x, 250 ln sigma, class labels."""

    sigma_d: float

    def __call__(self, net: nn.Module, x: Tensor, sigma: Tensor, c: Condition) -> Tensor:
        c_in = 1 / (expand(sigma, x) ** 2 + self.sigma_d**2).sqrt()
        labels = None if c is None or net.class_embedding is None else c["class_labels"]
        return net((c_in * x).to(x.dtype), 250 * sigma.log(), class_labels=labels, return_dict=False)[0]


def teacher(unet: UNet2DModel, sigma_d: float, null_class: int | None, pipe: Any = None) -> Teacher:
    """An EDM teacher around a network; null_class: the label that stands for "no label", None if it has none."""
    null = None if null_class is None else {"class_labels": torch.tensor([null_class])}
    schedule = EDM()

    def encode(labels: Any) -> Condition:
        return {"class_labels": torch.as_tensor(labels, device=unet.device).long()}

    def times(steps: int, sigma: float | None) -> tuple[float, ...]:
        ratios = torch.tensor([(sigma or schedule.sigma_max) * (1 - i / steps) ** RHO for i in range(steps)])
        return tuple(schedule.time(ratios.double()).tolist())

    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    denoiser = Denoiser(unet, schedule, "edm", Call(sigma_d), null, sigma_d)
    return Teacher(denoiser, encode, lambda x: x.clamp(-1, 1), shape, times, pipe)


@torch.no_grad()
def smooth(unet: UNet2DModel, max_frequency: float) -> None:
    """Cut the network off from the components of its time embedding that turn faster than `max_frequency`.

    In radians per unit of ln sigma; the embedding of 250 ln sigma turns by up to 250.
    """
    half = unet.time_embedding.linear_1.in_features // 2
    fast = 250 * 10000 ** -(torch.arange(half) / half) > max_frequency
    unet.time_embedding.linear_1.weight[:, fast.repeat(2)] = 0


def load(folder: Path) -> Teacher:
    """A pipeline folder as a teacher."""
    from diffusers import ConsistencyModelPipeline

    pipe = ConsistencyModelPipeline.from_pretrained(folder, local_files_only=True)
    extra = folder / "distill.json"
    null_class = json.loads(extra.read_text()).get("null_class") if extra.is_file() else None
    return teacher(pipe.unet, pipe.scheduler.config.sigma_data, null_class, pipe)


def pipeline(unet: UNet2DModel, sigma_d: float, sigma: float, steps: int) -> ConsistencyModelPipeline:
    """A pipeline that visits the levels sigma (1 - i / steps)^7, i = 0 .. steps - 1, in num_inference_steps = steps."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=steps + 1, sigma_min=0.0, sigma_max=sigma, sigma_data=sigma_d, rho=RHO, clip_denoised=False
    )
    return ConsistencyModelPipeline(unet, scheduler)


def export(student: Student, teacher: Teacher, unet: UNet2DModel) -> ConsistencyModelPipeline:
    """The student with the weights of `unet` as a plain diffusers pipeline that samples as the student does."""
    ratios = teacher.denoiser.schedule.ratio(torch.tensor(student.times, dtype=torch.float64)).tolist()
    steps, sigma = len(ratios), ratios[0]
    carried = torch.tensor([sigma * (1 - i / steps) ** RHO for i in range(steps)])
    if not torch.allclose(torch.tensor(ratios), carried, rtol=1e-4):
        raise ValueError(f"this family's scheduler carries the levels {carried.tolist()}, not the student's {ratios}")
    if steps > 1 and student.renoise != "fresh":
        raise ValueError("this family's scheduler renoises with fresh noise: train with --student.renoise fresh")
    if abs(student.input_scale / sigma - 1) > 1e-4:
        raise ValueError(f"this family's scheduler scales its input by sigma {sigma}, not by {student.input_scale}")
    return pipeline(unet, teacher.denoiser.sigma_d, sigma, steps)


def unet(
    channels: tuple[int, ...] = (16, 32), size: int = 8, in_channels: int = 1, classes: int = 11, layers: int = 1
) -> UNet2DModel:
    """A small UNet2DModel without attention; `classes` counts the null class."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=size,
        in_channels=in_channels,
        out_channels=in_channels,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        norm_num_groups=8,
        num_class_embeds=classes,
        add_attention=False,
    )
