"""Teachers from a folder or from the Hub."""

from __future__ import annotations

from pathlib import Path

import torch

from pipelines.components import Parts, locate_pipeline
from pipelines.families.base import Teacher
from pipelines.families.registry import find_family_of

__all__ = ["Teacher", "load", "load_teacher", "teacher_of"]


def load(
    folder: str | Path,
    resolution: int | None = None,
    frames: int | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    guidance_embedded: bool = False,
) -> Teacher:
    """The teacher of a local diffusers pipeline folder. Its family is found from model_index.json.

    resolution: pixels per side of its samples. frames: number of frames. None: the training size. dtype: precision of
    the network. guidance_embedded: the network takes its guidance scale as an input; ValueError if it cannot.
    """
    return teacher_of(Parts(folder, variant, dtype), resolution, frames, guidance_embedded)


def teacher_of(
    parts: Parts, resolution: int | None = None, frames: int | None = None, guidance_embedded: bool = False
) -> Teacher:
    """The teacher of a pipeline's components. Arguments as in `load`."""
    family = find_family_of(parts.index, parts.folder)
    if guidance_embedded:
        parts.index = parts.index | family.embedded_index
        parts.adapt_network = lambda net: family.with_guidance_embedding(net, parts)
    sizes = {"resolution": resolution, "frames": frames}
    parts.asked = {key: value for key, value in sizes.items() if value is not None}
    if frames is not None and family.task != "text-to-video":
        raise ValueError(
            f"frames is {frames}, but {parts.folder} is a {parts.index['_class_name']}, which makes no videos"
        )
    teacher = family.load(parts, resolution, frames)
    teacher.denoiser.blocks = family.blocks
    teacher.denoiser.taps = family.taps
    return teacher


def load_teacher(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    resolution: int | None = None,
    frames: int | None = None,
    dtype: torch.dtype = torch.float32,
    guidance_embedded: bool = False,
) -> Teacher:
    """The teacher of a folder, or of a name on the Hub, which is downloaded. Other arguments as in `load`."""
    return load(locate_pipeline(name, revision, variant), resolution, frames, variant, dtype, guidance_embedded)
