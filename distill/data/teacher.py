"""What data reads of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from distill.diffusion.denoiser import Condition, Denoiser


class Parts(Protocol):
    """The components of a pipeline's folder. asked: sizes of samples that are not the pipeline's own."""

    folder: Path
    device: torch.device
    asked: dict[str, int]

    @property
    def network(self) -> str:
        """The name of the denoising network among the components."""
        ...

    def scheduler(self) -> object:
        """The pipeline's scheduler."""
        ...


class Teacher(Protocol):
    """A denoiser with samples of `shape`, its text encoders and its autoencoder."""

    denoiser: Denoiser
    shape: tuple[int, ...]

    @property
    def parts(self) -> Parts: ...

    def encode(self, texts: Sequence[str], /) -> Condition:
        """The condition of B texts; every tensor is [B, ...]."""
        ...

    def latent(self, images: Tensor, eps: Tensor, /) -> Tensor:
        """x [B, *shape] of images in [-1, 1]; eps is the noise of the autoencoder's posterior."""
        ...

    def sample(self, z: Tensor, c: Condition, steps: int, guidance: float = 1.0, /) -> Tensor:
        """x [B, *shape] from the noise z, in `steps` steps of the teacher's scheduler."""
        ...
