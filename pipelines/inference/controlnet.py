"""Control of a finished student by images, with a ControlNet. Zhang et al. 2023, arXiv 2302.05543.

The adapter is a ControlNetModel of diffusers: a copy of the network's encoder that also reads the control image. It
adds to the encoder's outputs for the decoder, through convolutions that are zero at first. It is the child `control` of
a network. The image [B, C, H, W] in [0, 1] is the key "control" of the condition. Without it the output is unchanged.

    adapter = ControlNetModel.from_pretrained(folder, subfolder="controlnet")
    with show_picture(pipe.unet, adapter, picture):
        pipe(class_labels=[3], num_inference_steps=1)

`python -m pipelines.control FOLDER` (pipelines/export/control_error.py) measures how well an exported folder follows
control images of its own samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.diffusion.denoiser import Call, Condition, Denoiser, first_output
from distill.modules import shallow_module_copy
from pipelines.components import Network, Pipeline
from pipelines.families import latents
from pipelines.inference.skip_tuning import SKIPS
from pipelines.judges import perceptual
from pipelines.teacher import Teacher

if TYPE_CHECKING:
    from diffusers import ControlNetModel

    from distill.configuration import Config

FOLDER = "controlnet"  # subfolder of an exported pipeline
NAMES = ("sample", "timestep", "encoder_hidden_states")  # positional arguments of a UNet
WIDTHS = (16, 32, 96, 256)  # widths of the adapter's layers before its encoder; each but the first halves the size
LIMIT = (
    "It is the student that it was made of, until it is shown a picture in [0, 1]: its adapter is in controlnet/, a "
    "`ControlNetModel`; pass it as `controlnet=` to `from_pretrained` of the ControlNet pipeline of this family, where "
    "diffusers has one; else `pipelines.control.shown` of distill-one-step tells the network."
)


# ---- control images of samples ----


class ControlMethod(Protocol):
    """A method whose student follows control images. Fields as in `picture_extractor`."""

    control: str
    factor: int
    control_decoder: str | None


def build_control_extractor(config: Config[ControlMethod, object], teacher: Teacher) -> Callable[[Tensor], Tensor]:
    """c of a run's method: samples [B, *shape] -> control images [B, C, H, W] in [0, 1], without gradient."""
    method = config.method
    return picture_extractor(teacher, method.control, method.factor, None if config.smoke else method.control_decoder)


def picture_extractor(
    teacher: Teacher, name: str, factor: int, decoder: str | None = None
) -> Callable[[Tensor], Tensor]:
    """The control image of decoded samples. name and factor as in `PICTURES`."""
    images = perceptual.picture_decoder(teacher, decoder)

    @torch.no_grad()
    def picture(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            seen = (images(x) / 2 + 0.5).clamp(0, 1)
            return PICTURES[name](seen, factor).expand_as(seen)

    return picture


def gray(images: Tensor, factor: int = 1) -> Tensor:
    """[B, C, H, W] -> [B, 1, H, W]: the luminance of three channels, the mean of others."""
    weights = images.new_tensor([0.299, 0.587, 0.114]) if images.shape[1] == 3 else images.new_ones(images.shape[1])
    return (images * (weights / weights.sum())[:, None, None]).sum(1, keepdim=True)


def downsample(images: Tensor, factor: int) -> Tensor:
    """Mean of each square of `factor` pixels, at the size of the images."""
    if any(side % factor for side in images.shape[-2:]):
        raise ValueError(f"factor is {factor}; it must divide the sides of the images, {tuple(images.shape[-2:])}")
    return F.interpolate(F.avg_pool2d(images, factor), scale_factor=factor)


def canny(images: Tensor, factor: int = 1, low: float = 100 / 255, high: float = 200 / 255, rounds: int = 32) -> Tensor:
    """[B, C, H, W] in [0, 1] -> edges [B, 1, H, W] with values 0 and 1. Canny 1986, without blur.

    An edge is a ridge of |g_x| + |g_y| of Sobel's filter above `high`, or a ridge above `low` that is connected to one
    above `high` by at most `rounds` pixels. The thresholds are ControlNet's, of 255.
    """
    x = F.pad(gray(images), (1, 1, 1, 1), mode="replicate")
    across = x.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    g_x, g_y = F.conv2d(x, torch.stack([across, across.T])[:, None]).split(1, dim=1)
    size = g_x.abs() + g_y.abs()
    way = (torch.atan2(g_y, g_x) * (4 / torch.pi)).round().long() % 4  # across, falling, down, rising
    padded = F.pad(size, (1, 1, 1, 1))
    high_side, width = size.shape[-2:]
    at = lambda i, j: padded[..., 1 + i : 1 + i + high_side, 1 + j : 1 + j + width]
    steps = ((0, 1), (1, 1), (1, 0), (1, -1))
    ahead, behind = (torch.cat([at(sign * i, sign * j) for i, j in steps], 1).gather(1, way) for sign in (1, -1))
    ridge = (size > behind) & (size >= ahead)
    edges = (ridge & (size > high)).to(x.dtype)
    weak = (ridge & (size > low)).to(x.dtype)
    for _ in range(rounds):
        edges = weak * F.max_pool2d(edges, 3, 1, 1)
    return edges


PICTURES: dict[str, Callable[[Tensor, int], Tensor]] = {"canny": canny, "downsample": downsample, "gray": gray}


# ---- the adapter ----


def install_adapter(teacher: Teacher) -> None:
    """Add the adapter to the teacher's network, and pass "control" to it. ValueError if the network is not a UNet."""
    pixels = "vae" not in teacher.parts.index
    net = teacher.denoiser.net
    channels = teacher.shape[0] if pixels else 3
    factor = 1
    net.control = build_adapter(net, channels, factor if pixels else latents.factor(teacher.parts))
    teacher.denoiser = replace(teacher.denoiser, call=ControlledCall(teacher.denoiser.call))


def build_adapter(net: nn.Module, channels: int, factor: int) -> ControlNetModel:
    """An adapter for control images [B, channels, factor H, factor W] of a UNet with samples [B, ., H, W]."""
    from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel

    widths = WIDTHS[: factor.bit_length()]
    options = {"conditioning_channels": channels, "conditioning_embedding_out_channels": widths}
    if isinstance(net, UNet2DConditionModel):
        return ControlNetModel.from_unet(net, **options).eval()
    if not isinstance(net, UNet2DModel):
        raise ValueError(f"a control is for the UNets of SD, SDXL and EDM; this network is a {type(net).__name__}")
    known = set(inspect.signature(ControlNetModel.__init__).parameters) - {"mid_block_type"}
    config = {key: value for key, value in net.config.items() if key in known}
    found = ControlNetModel(**config | options, mid_block_type="UNetMidBlock2D")  # mid block of one block
    for name in ("conv_in", "time_embedding", "class_embedding", "down_blocks", "mid_block.resnets.0"):
        if net.class_embedding is not None or name != "class_embedding":
            found.get_submodule(name).load_state_dict(net.get_submodule(name).state_dict())
    return found.eval()


@contextmanager
def show_picture(net: nn.Module, adapter: nn.Module, picture: Tensor) -> Iterator[None]:
    """In this context, every call of a UNet of diffusers gets a control image [B or 1, C, H, W]."""
    found: list[Tensor] = []

    def call_adapter(module: nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
        inputs = {"encoder_hidden_states": None} | dict(zip(NAMES, args, strict=False)) | options
        x = inputs["sample"]
        assert x is not None
        picture_of_rows = picture.to(x).expand(len(x), -1, -1, -1)
        skips, middle = adapter(**inputs | {"controlnet_cond": picture_of_rows, "return_dict": False})
        found[:] = *skips, middle

    def add_to_middle(module: nn.Module, args: tuple[object, ...], out: Tensor) -> Tensor:
        return out + found.pop()

    def add_to_skips(
        up: nn.Module, args: tuple[object, ...], options: dict[str, object]
    ) -> tuple[tuple[()], dict[str, object]]:
        inputs = inspect.signature(up.forward).bind(*args, **options).arguments
        skips = inputs[SKIPS]
        ours = [found.pop() for _ in skips][::-1]
        inputs[SKIPS] = tuple(a + b for a, b in zip(skips, ours, strict=True))
        return (), inputs

    handles = [net.register_forward_pre_hook(call_adapter, with_kwargs=True)]
    handles += [net.get_submodule("mid_block").register_forward_hook(add_to_middle)]
    handles += [
        up.register_forward_pre_hook(add_to_skips, with_kwargs=True) for up in net.get_submodule("up_blocks").children()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class ControlledCall:
    """`call` for a network whose child `control` gets the control image if c has "control"."""

    call: Call

    @property
    def feature(self) -> Callable[[tuple[Tensor, ...]], Tensor]:
        return getattr(self.call, "feature", first_output)

    def __call__(self, net: nn.Module, x: Tensor, t: Tensor, c: Condition) -> Tensor:
        if c is None or "control" not in c:
            return self.call(net, x, t, c)
        with show_picture(net, net.control, c["control"]):  # type: ignore[arg-type]
            return self.call(net, x, t, {key: value for key, value in c.items() if key != "control"} or None)


def without_controlnet(denoiser: Denoiser) -> Denoiser:
    """The denoiser without its adapter. Weights are shared."""
    if not isinstance(denoiser.call, ControlledCall):
        return denoiser
    net = shallow_module_copy(denoiser.net)
    del net.control
    return replace(denoiser, net=net, call=denoiser.call.call)


# ---- exported ----


def example_picture(denoiser: Denoiser, teacher: Teacher) -> dict[str, Tensor]:
    """The control image for verifying an export, as a condition [1, ...]; empty for a denoiser without an adapter."""
    if not isinstance(denoiser.call, ControlledCall):
        return {}
    channels = cast(Network, denoiser.net.control).config.conditioning_channels
    side = latents.factor(teacher.parts) if "vae" in teacher.parts.index else 1
    size = [side * n for n in teacher.shape[-2:]]
    return {"control": torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0))}


class ControlledPipeline:
    """A pipeline whose network gets a control image at every call. Otherwise it equals the pipeline."""

    def __init__(self, pipe: Pipeline, picture: Tensor) -> None:
        self.__dict__.update(pipe=pipe, picture=picture)

    def __call__(self, *args: object, **options: object) -> object:
        picture = self.picture.to(self.pipe._execution_device)
        if hasattr(self.pipe, "controlnet"):
            return self.pipe(*args, image=picture, **options)
        with show_picture(self.pipe.unet, self.pipe.unet.control, picture):
            return self.pipe(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.pipe, name, value)


def with_picture(pipe: Pipeline, extra: Condition) -> Pipeline:
    """The pipeline with the control image of a condition, if it has one."""
    return ControlledPipeline(pipe, extra["control"]) if extra and "control" in extra else pipe


def load_adapter(folder: Path) -> ControlNetModel:
    """The adapter of an exported folder."""
    from diffusers import ControlNetModel

    found = ControlNetModel.from_pretrained(folder, subfolder=FOLDER, local_files_only=True, use_safetensors=True)
    return found.requires_grad_(False).eval()


def load_with_controlnet(pipe: Pipeline, folder: Path, **options: object) -> Pipeline:
    """A pipeline, loaded from `folder`, with the folder's adapter: diffusers' ControlNet pipeline, if there is one.

    Without an adapter in the folder the pipeline is returned unchanged. options: options of from_pretrained.
    """
    if not (folder / FOLDER).is_dir():
        return pipe
    import diffusers

    adapter = load_adapter(folder).to(pipe.unet.device)
    cls = getattr(diffusers, type(pipe).__name__.replace("Pipeline", "ControlNetPipeline"), None)
    if cls is not None:
        return cls.from_pretrained(folder, controlnet=adapter, **options)
    pipe.unet.control = adapter
    return pipe
