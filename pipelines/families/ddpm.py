"""Pixel-space teachers under a table of betas: DDPMPipeline, DDIMPipeline, and ConsistencyModelPipeline with labels.

The network is a UNet2DModel that predicts eps, v or x0. A DDPMPipeline passes no labels, and a DDIMPipeline replaces
the scheduler that it loads. A ConsistencyModelPipeline does neither: it calls a UNet2DModel with labels, if it has
some, under any scheduler. So teachers are called in it, and students are exported as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from pipelines.components import Parts
from pipelines.families import pixels, schedulers, student_schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.protocols import Network, Pipeline, Scheduler

if TYPE_CHECKING:
    from diffusers import UNet2DModel

TABLE: dict[str, object] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # Ho et al. 2020


def call(net: nn.Module, x: Tensor, n: Tensor, c: Condition) -> Tensor:
    """c: "class_labels" [B], which a network without labels does not read."""
    return net(x, n, class_labels=pixels.labels_of(net, c), return_dict=False)[0]


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    """The teacher of a folder. ValueError for a network that its pipelines cannot call, or a student cannot keep."""
    parts.adapt_network = without_variance
    if (scheduler := other_scheduler(parts)) is not None:
        parts.given["scheduler"] = scheduler
    parts.index = parts.index | {"_class_name": pixels.PIPELINE}
    schedule, kind = schedulers.table(parts.scheduler())
    validate_network(parts)
    side = set_side(parts, resolution)
    labelled = parts.net.config.get("num_class_embeds") is not None
    number = pixels.null_label(parts) if labelled else None
    null = None if number is None else pixels.encoder(parts.net)([number])
    denoiser = Denoiser(parts.net, schedule, kind, call, null)
    return pixels.teacher(denoiser, parts.net, (parts.net.config.in_channels, side, side), parts, FAMILY)


def other_scheduler(parts: Parts) -> Scheduler | None:
    """The scheduler that replaces the folder's: that of a DDIMPipeline, or one with a fixed variance; else None."""
    from diffusers import DDIMScheduler

    stored = parts.scheduler()
    if parts.index["_class_name"] == "DDIMPipeline":
        return DDIMScheduler.from_config(stored.config)  # as the pipeline itself does
    if str(stored.config.get("variance_type")).startswith("learned"):
        return type(stored).from_config(stored.config, variance_type="fixed_small")
    return None


def without_variance(net: Network) -> Network:
    """The network without the outputs of a learned variance (Nichol & Dhariwal 2021), which no student needs."""
    channels = net.config.in_channels
    if net.config.out_channels == 2 * channels:
        last = net.get_submodule("conv_out")
        for name in ("weight", "bias"):
            last.register_parameter(name, nn.Parameter(last.get_parameter(name)[:channels].detach().clone()))
        net.register_to_config(out_channels=channels)
    return net


def validate_network(parts: Parts) -> None:
    """ValueError for a network whose output is not one prediction, or whose labels are not numbers of classes."""
    config = parts.net.config
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"{parts.folder}: its unet has {config.in_channels} channels and predicts {config.out_channels}: a "
            "prediction has as many, or twice as many with a learned variance"
        )
    if config.get("class_embed_type") is not None:
        raise ValueError(
            f"{parts.folder}: its unet has class_embed_type {config.class_embed_type!r}, and only labels of "
            "num_class_embeds classes can be distilled"
        )


def set_side(parts: Parts, resolution: int | None) -> int:
    """Pixels per side of a sample: the network's own, or `resolution`, which its config then has, too."""
    config = parts.net.config
    sides = config.sample_size if isinstance(config.sample_size, list | tuple) else [config.sample_size]
    if resolution is None and (len({*sides}) != 1 or sides[0] is None):
        raise ValueError(
            f"{parts.folder}: the sample_size of its unet is {config.sample_size}; where it is not the one side of a "
            "square, pass --resolution PIXELS"
        )
    side = sides[0] if resolution is None else resolution
    unit = 2 ** (len(config.block_out_channels) - 1)
    if side % unit or side < 1:
        raise ValueError(f"resolution is {side}; this teacher needs a multiple of {unit}")
    if config.sample_size != side:
        parts.net.register_to_config(sample_size=side)
    return side


def tiny(kind: str = pixels.PIPELINE, labels: bool = True, **scheduler: object) -> Pipeline:
    """A tiny random pipeline of one of the three classes: ten classes and a null class, or no labels."""
    import diffusers

    from pipelines.families import tiny

    net = tiny.amplify(unet((8, 16), 8, 3, 11 if labels else None), 4.0, "class_embedding", "conv_out")
    tiny.amplify(net, 2.0, "time_embedding")
    make = diffusers.DDPMScheduler if kind == "DDPMPipeline" else diffusers.DDIMScheduler
    return getattr(diffusers, kind)(net, make(**TABLE, **{"clip_sample": False} | scheduler))


def unet(channels: tuple[int, ...], side: int, in_channels: int, classes: int | None, layers: int = 1) -> UNet2DModel:
    """A UNet2DModel with attention at its last level. `classes` counts the null class; None: no labels."""
    from diffusers import UNet2DModel

    plain = len(channels) - 1
    return UNet2DModel(
        sample_size=side,
        in_channels=in_channels,
        out_channels=in_channels,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        block_out_channels=channels,
        layers_per_block=layers,
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=classes,
    )


FAMILY = Family(
    name="ddpm",
    title="DDPM and DDIM, pixels",
    pipelines=("DDPMPipeline", "DDIMPipeline", pixels.PIPELINE),
    schedulers=schedulers.TABLES,
    schedule="table",
    unet=True,
    task="unconditional-image-generation",
    load=load,
    sample=pixels.sample,
    tiny=tiny,
    tiny_facts={"null_class": 10},
    condition=pixels.condition,
    student_schedulers=student_schedulers.of_table,
    no_guidance=0.0,  # the pipeline does not use it: guidance is built in
    render_call=pixels.render_call,
    examples=pixels.examples,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj"),
    single_files=False,
    taps=("mid_block",),
    blocks=("ResnetBlock2D", "Attention"),
    models={
        "ddpm-cifar10": Model(
            "google/ddpm-cifar10-32",
            "DDPMPipeline",
            "UNet2DModel",
            {
                "sample_size": 32,
                "block_out_channels": (128, 256, 256, 256),
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                "downsample_padding": 0,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "norm_eps": 1e-6,
                "attention_head_dim": None,
            },
            ("DDPMScheduler", TABLE),
            vae={},
        )
    },
)
