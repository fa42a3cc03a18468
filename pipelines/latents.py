"""What latent families share: the autoencoder's scale, the size of a sample, the schedule of a scheduler's config."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.schedule import VP, Flow, Kind, Schedule

if TYPE_CHECKING:
    from pipelines import Parts

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # prediction_type -> kind


def table(scheduler: Any) -> tuple[Schedule, Kind]:
    """The schedule and prediction kind of a DDPM-like scheduler."""
    kind = KINDS[scheduler.config.prediction_type]
    return VP(tuple(scheduler.alphas_cumprod.double().tolist())), kind


def flow(scheduler: Any, scale: float | None = None) -> tuple[Schedule, Kind]:
    """The schedule and prediction kind of a flow-matching scheduler; its shift belongs to the times."""
    return Flow(float(scale or scheduler.config.num_train_timesteps)), "flow"


def kl(parts: Parts) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """(decode, latent) of an AutoencoderKL: x = (posterior sample - shift) * scale."""

    def ends() -> tuple[float, float]:
        config = parts.vae.config
        return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0

    def decode(x: Tensor) -> Tensor:
        scale, shift = ends()
        vae = parts.vae.to(x.device)
        return vae.decode((x / scale + shift).to(vae.dtype), return_dict=False)[0].to(x.dtype)

    @torch.no_grad()
    def latent(images: Tensor, eps: Tensor) -> Tensor:
        scale, shift = ends()
        vae = parts.vae.to(images.device)
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
        return (posterior.mean + posterior.std * eps.to(posterior.mean) - shift).to(images.dtype) * scale

    return decode, latent


def kl3d(parts: Parts) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """(decode, latent) of a causal video autoencoder: x = (posterior sample - mean) / std, each of a channel."""

    def ends(x: Tensor) -> list[Tensor]:
        config = parts.vae.config
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


def dc(parts: Parts) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """(decode, latent) of an AutoencoderDC, which has no posterior: x = latent * scale, whatever eps."""

    def decode(x: Tensor) -> Tensor:
        vae = parts.vae.to(x.device)
        return vae.decode((x / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].to(x.dtype)

    @torch.no_grad()
    def latent(images: Tensor, eps: Tensor) -> Tensor:
        vae = parts.vae.to(images.device)
        return vae.encode(images.to(vae.dtype)).latent.to(images.dtype) * vae.config.scaling_factor

    return decode, latent


def factor(parts: Parts) -> int:
    """Pixels along a side of a picture for one of its latent."""
    config = parts.config("vae")
    levels = config.get("encoder_block_out_channels") or config.get("block_out_channels") or config["dim_mult"]
    return 2 ** (len(levels) - 1)


def shape(parts: Parts, resolution: int | None, patch: int = 1) -> tuple[int, int, int]:
    """(C, H, W) of what the network sees: its own size, or the one of `resolution` pixels, in whole patches."""
    config = parts.net.config
    if resolution is None:
        return config.in_channels, config.sample_size, config.sample_size
    pixels = factor(parts)
    if resolution % (pixels * patch) or resolution < 1:
        raise ValueError(f"resolution is {resolution}; this teacher needs a multiple of {pixels * patch}")
    return config.in_channels, resolution // pixels, resolution // pixels
