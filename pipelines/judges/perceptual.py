"""Perceptual distance of two samples: LPIPS of their decoded images. Zhang et al. 2018, arXiv 1801.03924."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from distill.configuration import Config
    from pipelines.teacher import Teacher

Distance = Callable[[Tensor, Tensor], Tensor]


def check_lpips() -> None:
    """ValueError if the package is missing. It imports nothing."""
    if importlib.util.find_spec("lpips") is None:
        raise ValueError(
            "distance 'lpips' needs the package lpips: pip install 'distill-one-step[lpips]', "
            "or choose --method.distance huber"
        )


class PerceptualMethod(Protocol):
    """A method with a perceptual distance. decoder: as in `sample_distance`."""

    decoder: str | None


def build_perceptual_distance(config: Config[PerceptualMethod, object], teacher: Teacher) -> Distance:
    """The distance of a run. A smoke run downloads nothing: it compares random features of decoded samples."""
    each = config.train.gradient_checkpointing
    if config.smoke:
        return sample_distance(teacher, None, each, random_distance())
    return sample_distance(teacher, config.method.decoder, each)


def sample_distance(
    teacher: Teacher, decoder: str | None = None, each: bool = False, features: Distance | None = None
) -> Distance:
    """d(x, y) -> [B]: distance of samples x from samples y, both [B, *teacher.shape]; for video the mean over frames.

    The gradient flows through the frozen decoder to x only. All computations are float32, also within autocast.
    decoder: folder or Hub name of an AutoencoderTiny (SDXL: madebyollin/taesdxl); None: the teacher's own. each:
    process samples one by one and recompute them in the backward pass, with the memory of a single image. features:
    features of images [B, 3, H, W] in [-1, 1], not clamped; None: LPIPS on VGG16, whose [0, 1] is our [-1, 1].
    """
    images = picture_decoder(teacher, decoder)
    net = features or load_lpips()

    def distance(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                target = images(y)
            return net(images(x), target).reshape(len(x), -1).mean(1)

    def one_by_one(x: Tensor, y: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        pairs = zip(x.split(1), y.split(1), strict=True)
        return torch.cat([checkpoint(distance, *pair, use_reentrant=False) for pair in pairs])

    return one_by_one if each else distance


def picture_decoder(teacher: Teacher, decoder: str | None = None) -> Callable[[Tensor], Tensor]:
    """Samples [B, *teacher.shape] -> images [B, 3, H, W] in [-1, 1], for video frames [B T, 3, H, W], with gradient.

    decoder: folder or Hub name of an AutoencoderTiny; None: the teacher's own.
    """
    decode = teacher.decode if decoder is None else tiny_decoder(teacher, decoder)

    def images(x: Tensor) -> Tensor:
        found = decode(x.float())
        return found.transpose(1, 2).flatten(0, 1) if found.ndim == 5 else found

    return images


def load_lpips(**options: bool) -> Distance:
    """The frozen network of the package. torchvision downloads its VGG16 if it is not on disk."""
    check_lpips()
    from lpips import LPIPS

    try:
        net = LPIPS(net="vgg", verbose=False, **options).requires_grad_(False)
    except OSError as error:
        raise ValueError(f"LPIPS needs the weights of VGG16, which torchvision could not fetch: {error}") from None
    return lambda x, y: net.to(x.device)(x, y)


def random_distance() -> Distance:
    """The squared difference of fixed random features."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3)).requires_grad_(False)
    return lambda x, y: (net.to(x.device)(x) - net(y)).square().mean((1, 2, 3), keepdim=True)


def tiny_decoder(teacher: Teacher, decoder: str) -> Callable[[Tensor], Tensor]:
    """The decoder of a frozen AutoencoderTiny."""
    from diffusers import AutoencoderTiny

    try:
        vae = AutoencoderTiny.from_pretrained(decoder, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"no AutoencoderTiny at {decoder!r}, as a folder or on the Hub: {error}") from None
    if vae.config.latent_channels != teacher.shape[0]:
        raise ValueError(
            f"{decoder} decodes {vae.config.latent_channels} channels, the teacher's samples have {teacher.shape[0]}"
        )
    vae.requires_grad_(False).eval()
    return lambda x: vae.to(x.device).decode(x / vae.config.scaling_factor, return_dict=False)[0]
