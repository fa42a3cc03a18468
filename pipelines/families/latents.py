"""Functions that latent families share: scale of the autoencoder, size of a sample, schedule of a config."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.diffusion.schedule import Flow, Kind, Schedule
from pipelines.components import Parts
from pipelines.families import schedulers
from pipelines.protocols import Config, Pipeline, Scheduler

Scale = Tensor | float  # one number, or one for each channel
Coder = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]  # decode(x), latent(images, eps)


class TwoStreams:
    """Part of the call of a transformer whose blocks have a stream of text and one of image tokens."""

    projections = (  # of the attention of both streams
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )

    def feature(self, output: tuple[Tensor, Tensor]) -> Tensor:
        """The image tokens [B, N, D] of a block's two streams (text, image)."""
        return output[1]


def call_pipeline(pipe: Pipeline, prompts: Sequence[str], z: Tensor, steps: int, **options: object) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of the pipeline itself from unit noise z. options: further ones of its call."""
    height, width = (side * pipe.vae_scale_factor for side in z.shape[-2:])
    base: dict[str, object] = {"num_inference_steps": steps, "height": height, "width": width, "latents": z}
    return pipe(list(prompts), **base | options, output_type="pt").images


def flow(scheduler: Scheduler, scale: float | None = None) -> tuple[Schedule, Kind]:
    """The schedule and prediction kind of a flow-matching scheduler. Its shift belongs to the times."""
    return Flow(float(scale or schedulers.flow(scheduler))), "flow"


def kl(parts: Parts, ends: Callable[[Config, Tensor], tuple[Scale, Scale]]) -> Coder:
    """(decode, latent) of an AutoencoderKL: x = (posterior sample - shift) * scale.

    ends(config, x) -> (scale, shift), as the family's pipeline reads them from the autoencoder's config.
    """

    def decode(x: Tensor) -> Tensor:
        scale, shift = ends(parts.vae.config, x)
        vae = parts.vae.to(x.device)
        return vae.decode((x / scale + shift).to(vae.dtype), return_dict=False)[0].to(x.dtype)

    @torch.no_grad()
    def latent(images: Tensor, eps: Tensor) -> Tensor:
        scale, shift = ends(parts.vae.config, images)
        vae = parts.vae.to(images.device)
        encoded = vae.encode(images.to(vae.dtype))
        if hasattr(encoded, "latent_dist"):
            found = encoded.latent_dist.mean + encoded.latent_dist.std * eps.to(encoded.latent_dist.mean)
        else:
            found = encoded.latents  # an AutoencoderTiny has no posterior
        return (found - shift).to(images.dtype) * scale

    return decode, latent


def scale_only(config: Config, x: Tensor) -> tuple[Scale, Scale]:
    """(scale, shift) in the pipelines of SD and PixArt, which read only scaling_factor."""
    return config.scaling_factor, 0.0


def scale_and_shift(config: Config, x: Tensor) -> tuple[Scale, Scale]:
    """(scale, shift) in the pipelines of SD3 and FLUX, which need a shift_factor."""
    if (shift := config.get("shift_factor")) is None:
        raise ValueError(
            "the teacher's VAE has no shift_factor, which its pipeline adds to latents: write 0 where it has none"
        )
    return config.scaling_factor, shift


def channel_scale_and_shift(config: Config, x: Tensor) -> tuple[Scale, Scale]:
    """(scale, shift) in the pipeline of SDXL, which also reads latents_mean and latents_std for each channel."""
    mean = config.get("latents_mean")
    std = config.get("latents_std")
    if mean is None or std is None:
        return config.scaling_factor, 0.0
    of = lambda values: torch.tensor(values).to(x).reshape(-1, 1, 1)
    return config.scaling_factor / of(std), of(mean)


def kl3d(parts: Parts) -> Coder:
    """(decode, latent) of a causal video autoencoder: x = (posterior sample - mean) / std, for each channel."""

    def ends(x: Tensor) -> list[Tensor]:
        config = parts.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            raise ValueError("the teacher's VAE has no latents_mean or latents_std, which its pipeline reads")
        return [torch.tensor(v).to(x).reshape(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)]

    def decode(x: Tensor) -> Tensor:
        mean, std = ends(x)
        vae = parts.vae.to(x.device)
        return vae.decode((x * std + mean).to(vae.dtype), return_dict=False)[0].to(x.dtype)

    @torch.no_grad()
    def latent(videos: Tensor, eps: Tensor) -> Tensor:
        mean, std = ends(videos)
        vae = parts.vae.to(videos.device)
        posterior = vae.encode(videos.to(vae.dtype)).latent_dist
        return ((posterior.mean + posterior.std * eps.to(posterior.mean)).to(videos.dtype) - mean) / std

    return decode, latent


def dc(parts: Parts) -> Coder:
    """(decode, latent) of an AutoencoderDC: x = latent * scale. It has no posterior and ignores eps."""

    def decode(x: Tensor) -> Tensor:
        vae = parts.vae.to(x.device)
        return vae.decode((x / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].to(x.dtype)

    @torch.no_grad()
    def latent(images: Tensor, eps: Tensor) -> Tensor:
        vae = parts.vae.to(images.device)
        return vae.encode(images.to(vae.dtype)).latent.to(images.dtype) * vae.config.scaling_factor

    return decode, latent


def factor(parts: Parts) -> int:
    """Pixels per side of an image for one pixel of its latent."""
    config = parts.config("vae")
    names = ("encoder_block_out_channels", "block_out_channels", "down_block_out_channels", "dim_mult")
    levels = next((config[name] for name in names if config.get(name)), None)
    if not isinstance(levels, list | tuple):
        raise ValueError(f"the teacher's VAE ({config.get('_class_name')}) has none of {', '.join(names)}: its size")
    return 2 ** (len(levels) - 1)


def shape(parts: Parts, resolution: int | None, patch: int = 1) -> tuple[int, int, int]:
    """(C, H, W) of the network's input: its own size, or the one for `resolution` pixels, in complete patches."""
    config = parts.net.config
    channels = parts.config("vae").get("latent_channels", config.in_channels)
    if config.in_channels not in (channels, 4 * channels):  # FLUX packs 2 x 2 of them
        raise ValueError(
            f"{parts.folder}: its {parts.network} takes {config.in_channels} channels, its VAE's latents have "
            f"{channels}: networks for inpainting or editing cannot be distilled here"
        )
    if resolution is None:
        sides = config.sample_size if isinstance(config.sample_size, list | tuple) else [config.sample_size]
        if len({*sides}) != 1 or sides[0] is None:
            where = f"{parts.folder / parts.network}/config.json"
            raise ValueError(
                f"{where}: sample_size is {config.sample_size}; where it is not the one side of a square, pass "
                "--resolution PIXELS"
            )
        return config.in_channels, sides[0], sides[0]
    pixels = factor(parts)
    if resolution % (pixels * patch) or resolution < 1:
        raise ValueError(f"resolution is {resolution}; this teacher needs a multiple of {pixels * patch}")
    return config.in_channels, resolution // pixels, resolution // pixels
