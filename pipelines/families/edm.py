"""Pixel-space EDM teachers and students, with or without labels, in diffusers' ConsistencyModelPipeline.

The scheduler's config carries sigma_data and the range of sigma. With sigma_min = 0 its step is exactly EDM's
preconditioning D = c_skip x + c_out F(c_in x, 250 ln sigma); the network is trained with that c_noise. Networks that
were trained with another c_noise (pipelines/export/edm_convert.py) keep it: see `export_network`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Call as NetworkCall
from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.schedule import EDM, expand
from distill.diffusion.transition import FRESH
from distill.training.config import StudentConfig
from pipelines import fields
from pipelines.components import Parts
from pipelines.families import pixels, schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.protocols import Network, Scheduler

if TYPE_CHECKING:
    from diffusers import ConsistencyModelPipeline, UNet2DModel

    from distill.diffusion.student import Student

RHO = 7.0
C_NOISE = 250.0  # a ConsistencyModelPipeline passes 250 ln sigma to its network


@dataclass(frozen=True)
class Call:
    """Calls a UNet2DModel or a SongUNet (pipelines/edm_nets.py): c_in x, c_noise ln sigma, class labels."""

    sigma_d: float
    c_noise: float = C_NOISE

    def __call__(self, net: nn.Module, x: Tensor, sigma: Tensor, c: Condition) -> Tensor:
        c_in = 1 / (expand(sigma, x) ** 2 + self.sigma_d**2).sqrt()
        labels = pixels.labels_of(net, c)
        return net((c_in * x).to(x.dtype), self.c_noise * sigma.log(), class_labels=labels, return_dict=False)[0]


def teacher(
    unet: Network, sigma_d: float, null_class: int | None, parts: Any = None, c_noise: float = C_NOISE
) -> Teacher:
    """An EDM teacher with a network whose noise input is c_noise * ln sigma.

    null_class: the label for "no label"; None if there is none. parts: None for a network without a folder.
    """
    null = None if null_class is None else {"class_labels": torch.tensor([null_class])}
    schedule = EDM()

    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    denoiser = Denoiser(unet, schedule, "edm", Call(sigma_d, c_noise), null, sigma_d)
    return pixels.teacher(denoiser, unet, shape, parts, FAMILY)


@torch.no_grad()
def smooth(unet: UNet2DModel, max_frequency: float) -> None:
    """Remove components of the time embedding with frequencies above `max_frequency` from the network's input.

    Frequencies are in radians per unit of ln sigma. The embedding of 250 ln sigma has frequencies up to 250.
    """
    half = unet.time_embedding.linear_1.in_features // 2
    fast = 250 * 10000 ** -(torch.arange(half) / half) > max_frequency
    unet.time_embedding.linear_1.weight[:, fast.repeat(2)] = 0


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    """distill.json beside model_index.json holds the label for "no label", and c_noise if it is not 250."""
    facts = fields.facts(parts.folder)
    scheduler = parts.scheduler()
    c_noise = facts.get("c_noise", C_NOISE)
    schedulers.check_class(scheduler, schedulers.EDM, "EDM's levels")
    return teacher(parts.net, scheduler.config.sigma_data, pixels.null_label(parts), parts, c_noise)


def export_call(call: NetworkCall) -> Call:
    """The call of an exported network, equal to the one in ConsistencyModelPipeline."""
    assert isinstance(call, Call)
    return replace(call, c_noise=C_NOISE)


@torch.no_grad()
def export_network(net: nn.Module, student: Student) -> nn.Module:
    """The student's network for ConsistencyModelPipeline, whose noise input is 250 ln sigma.

    If the network has another noise input, its first layer W e + b gets the smallest change that maps the pipeline's
    embeddings e of the student's levels like their own, and still maps its own embedding of every sigma as before.
    """
    call = student.denoiser.call
    schedule = student.denoiser.schedule
    assert isinstance(call, Call) and isinstance(schedule, EDM)
    if call.c_noise == C_NOISE:
        return net
    net = copy.deepcopy(net)
    weight = net.get_parameter("time_embedding.linear_1.weight")
    time_proj = net.get_submodule("time_proj")
    embed = lambda scale, log: time_proj((scale * log).to(weight.device)).double()
    few = schedule.ratio(torch.tensor(student.times, dtype=torch.float64)).log()
    every = torch.linspace(math.log(schedule.sigma_min), math.log(schedule.sigma_max), 64, dtype=torch.float64)
    own = embed(call.c_noise, few)
    told = embed(C_NOISE, few)
    kept = embed(call.c_noise, every)
    change = torch.cat([own - told, torch.zeros_like(kept)]) @ weight.T.double()
    weight.data += (torch.linalg.pinv(torch.cat([told, kept]), rtol=1e-6) @ change).T
    return net


def limits(net: nn.Module) -> tuple[str, ...]:
    """The limits in a model card."""
    home = type(net).__module__
    if home.startswith("diffusers."):
        return ()
    return (
        f"Without distill-one-step installed: no network of diffusers is DDPM++, so model_index.json names {home}."
        f"{type(net).__name__} of that package. No code is loaded from this folder.",
    )


def scheduler(sigma_d: float, sigma: float, points: int, rho: float = RHO) -> Scheduler:
    """A scheduler with the levels sigma (1 - v i)^rho, i = 0 .. N - 1, in N inference steps.

    v = floor(points / N) / (points - 1), which is 1 / N for N + 1 points.
    """
    from diffusers import CMStochasticIterativeScheduler

    return CMStochasticIterativeScheduler(
        num_train_timesteps=points, sigma_min=0.0, sigma_max=sigma, sigma_data=sigma_d, rho=rho, clip_denoised=False
    )


def schedulers_of_student(teacher: Teacher, student: StudentConfig) -> Iterator[Scheduler]:
    """Candidates with the levels sigma (1 - v i)^rho, i = 0, 1, ...; v is near 1 / steps, by default equal."""
    schedule = teacher.denoiser.schedule
    assert isinstance(schedule, EDM)
    steps = student.steps
    times = student.times
    if not student.transition.ends_at_data or (steps > 1 and student.transition is not FRESH):
        raise ValueError(
            "this family's scheduler renoises with fresh noise: train with --student.renoise fresh, or, where a method "
            "needs another, a student of one call (--student.steps 1 --student.renoise fresh)"
        )
    start = times[0] if times else student.first_time(schedule)
    ratios = schedule.ratio(torch.tensor(times or [start]).double()).tolist()
    sigma = ratios[0]
    if student.scale is not None and abs(student.scale / sigma - 1) > 1e-4:
        raise ValueError(f"this family's scheduler scales its input by sigma {sigma:.4g}, not by {student.scale}")
    make = lambda points, rho=RHO: scheduler(teacher.denoiser.sigma_d, sigma, points, rho)
    points = steps + 1
    if sigma / steps**RHO < schedule.sigma_min:  # the last call would be below the schedule
        even = float(schedule.ratio(torch.tensor([start / steps]).double()))  # levels of uniformly spaced times
        last = lambda points: RHO * math.log(1 - (steps - 1) / (points - 1))
        points = min(range(steps + 1, 2 * steps), key=lambda points: abs(last(points) - math.log(even / sigma)))
    yield make(points)
    for r in range(1, 65) if times and steps > 1 else ():
        for points in range(r * steps, (r + 1) * steps):
            rest = 1 - (steps - 1) * r / (points - 1)
            rho = math.log(ratios[-1] / sigma) / math.log(rest) if rest > 1e-9 else 0.0
            if abs(math.log(sigma)) < 600 * rho:  # the scheduler computes sigma^(1 / rho)
                yield make(points, rho)


def pipeline(unet: UNet2DModel, sigma_d: float, sigma: float, steps: int) -> ConsistencyModelPipeline:
    """A pipeline of the network and that scheduler."""
    from diffusers import ConsistencyModelPipeline

    return ConsistencyModelPipeline(unet, scheduler(sigma_d, sigma, steps + 1))


def tiny() -> ConsistencyModelPipeline:
    """A tiny random teacher with ten classes and a null class."""
    return pipeline(unet((8, 16)), 0.5, 80.0, 1)


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


LEVELS: tuple[str, dict[str, object]] = (
    "CMStochasticIterativeScheduler",
    {"sigma_min": 0.0, "sigma_max": 80.0, "sigma_data": 0.5},
)  # of `models`
FAMILY = Family(
    name="edm",
    title="EDM, pixels",
    pipelines=(pixels.PIPELINE,),
    task="unconditional-image-generation",
    load=load,
    sample=pixels.sample,
    tiny=tiny,
    tiny_facts={"null_class": 10},
    condition=pixels.condition,
    student_schedulers=schedulers_of_student,
    no_guidance=0.0,  # the pipeline does not use it: guidance is built in
    render_call=pixels.render_call,
    examples=pixels.examples,
    export_network=export_network,
    export_call=export_call,
    limits=limits,
    schedule="edm",
    unet=True,
    taps=("mid_block",),
    blocks=("ResnetBlock2D", "Attention", "Block"),  # Block is a class of SongUNet
    models={
        "imagenet64": Model(
            "edm-imagenet-64x64-cond-adm",
            "ConsistencyModelPipeline",
            "UNet2DModel",
            {
                "sample_size": 64,
                "block_out_channels": (192, 384, 576, 768),
                "layers_per_block": 3,
                "down_block_types": ("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
                "up_block_types": (*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
                "downsample_type": "resnet",
                "upsample_type": "resnet",
                "resnet_time_scale_shift": "scale_shift",
                "attention_head_dim": 64,
                "attn_norm_num_groups": 32,
                "num_class_embeds": 1000,
            },
            LEVELS,
        ),
        "cifar10": Model(
            "edm-cifar10-32x32-cond-vp",
            "ConsistencyModelPipeline",
            "SongUNet",
            {"num_class_embeds": 10, "augment_dim": 9},
            LEVELS,
        ),
    },
)
