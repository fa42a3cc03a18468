"""From a diffusers pipeline to a teacher, and from a student back to a pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.denoiser import Condition, Denoiser

FAMILIES = {"ConsistencyModelPipeline": "edm"}  # _class_name of model_index.json -> module of this package


@dataclass(eq=False)
class Teacher:
    """A diffusers pipeline as a denoiser.

    encode(conditions) -> c; decode(x) -> images [B, C, H, W] in [-1, 1]; shape of one sample (C, H, W);
    times(steps, sigma) -> the student's times that the family's exported scheduler can carry.
    """

    denoiser: Denoiser
    encode: Callable[[Any], Condition]
    decode: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    times: Callable[[int, float | None], tuple[float, ...]]
    pipe: Any


def load(folder: str | Path) -> Teacher:
    """The teacher of a local diffusers pipeline folder; its family is found from model_index.json."""
    import importlib

    name = index(folder)["_class_name"]
    if name not in FAMILIES:
        raise ValueError(f"{folder} is a {name}; supported pipelines are {sorted(FAMILIES)}")
    return importlib.import_module(f"pipelines.{FAMILIES[name]}").load(Path(folder))


def tiny() -> Teacher:
    """A tiny random teacher, for smoke runs."""
    from pipelines import edm

    unet = edm.unet((8, 16))
    return edm.teacher(unet, 0.5, null_class=10, pipe=edm.pipeline(unet, 0.5, 80.0, 1))


class ExportError(Exception):
    """An exported pipeline does not sample what the student samples."""


def index(folder: str | Path) -> dict[str, Any]:
    """model_index.json of a pipeline folder, or a ValueError that says what is missing."""
    path = Path(folder) / "model_index.json"
    if not str(folder):
        raise ValueError("no teacher given: pass --teacher FOLDER, a diffusers pipeline on this disk")
    if not path.is_file():
        raise ValueError(f"no teacher at {str(folder)!r}: a diffusers pipeline folder has a model_index.json")
    return json.loads(path.read_text())
