"""A diffusers pipeline as a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.diffusion.denoiser import Condition, Denoiser
from pipelines.components import Parts, located


@dataclass(eq=False)
class Teacher:
    """A diffusers pipeline as a denoiser.

    encode   prompts (or class labels), a list of B -> c with B rows; loads the text encoders at its first call.
    decode   x [B, *shape] -> images [B, C, H, W], videos [B, C, T, H, W], in [-1, 1].
    latent   images in [-1, 1] and eps [B, *shape] -> x, a sample of the VAE's posterior; pixel models: the images.
    shape    of one sample, (C, H, W), video (C, T, H, W).
    parts    the folder it comes from; parts.family is its module.
    negative encode, as the pipeline does it for negative prompts; None: the same.
    """

    denoiser: Denoiser
    encode: Callable[[Sequence[Any]], Condition]
    decode: Callable[[Tensor], Tensor]
    latent: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    parts: Parts
    negative: Callable[[Sequence[Any]], Condition] = None

    def __post_init__(self) -> None:
        self.encode = torch.no_grad()(self.encode)
        self.negative = torch.no_grad()(self.negative or self.encode)

    def null(self) -> Condition:
        """The condition of "no prompt", kept in denoiser.null: that of the empty prompt where none is given yet."""
        if self.denoiser.null is None:
            self.denoiser.null = self.negative([""])
        return self.denoiser.null

    @torch.no_grad()
    def sample(self, z: Tensor, c: Condition, steps: int, guidance: float = 1.0, null: Condition = None) -> Tensor:
        """x [B, *shape] of the teacher under its own scheduler, from unit noise z; null: of a negative prompt."""
        from distill.diffusion.guidance import Guided

        base = replace(self.denoiser, null=null or (self.null() if guidance != 1 else None))
        guided = getattr(self.parts.family, "Rescaled", Guided)(base, guidance)
        scheduler = self.parts.scheduler()
        self.set_timesteps(scheduler, steps)
        last = float(base.schedule.native(torch.ones(1, dtype=torch.float64)))
        x = z * getattr(scheduler, "init_noise_sigma", 1.0)
        for n in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, n) if hasattr(scheduler, "scale_model_input") else x
            t = (n.double() / last).expand(len(x)).to(x.device)
            x = scheduler.step(guided(scaled, t, c).out, n, x, return_dict=False)[0]
        return x

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """As the family's pipeline does it: some pass sigmas of their own or a shift that depends on the size."""
        special = getattr(self.parts.family, "set_timesteps", None)
        special(scheduler, steps, self) if special else scheduler.set_timesteps(steps)


def load(
    folder: str | Path,
    resolution: int | None = None,
    frames: int | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    told: bool = False,
) -> Teacher:
    """The teacher of a local diffusers pipeline folder; its family is found from model_index.json.

    resolution, frames: of its samples, in pixels and pictures; None: what the network was trained for. dtype: of the
    network. told: it is to be told its guidance (Parts).
    """
    parts = Parts(folder, variant, dtype, told)
    asked = {"resolution": resolution, "frames": frames}
    parts.asked = {key: value for key, value in asked.items() if value is not None}
    if frames is not None and getattr(parts.family, "TASK", "") != "text-to-video":
        raise ValueError(f"frames is {frames}, but {folder} is a {parts.index['_class_name']}, which makes no videos")
    teacher = parts.family.load(parts, resolution, frames)
    teacher.denoiser.blocks = parts.family.BLOCKS
    return teacher


def opened(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    resolution: int | None = None,
    frames: int | None = None,
    dtype: torch.dtype = torch.float32,
    told: bool = False,
) -> Teacher:
    """The teacher of a folder or of a name on the Hub, which is downloaded; its network in `dtype`, `told` or not."""
    return load(located(name, revision, variant), resolution, frames, variant, dtype, told)
