"""What pixel families share: class labels, and diffusers' ConsistencyModelPipeline, which takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from pipelines import fields
from pipelines.components import Parts
from pipelines.families.base import Family, Teacher
from pipelines.protocols import Config, Network, Pipeline, config_of

PIPELINE = "ConsistencyModelPipeline"


def labels_of(net: nn.Module, c: Condition) -> Tensor | None:
    """The labels [B] of a condition; None for a network without labels."""
    return None if c is None or getattr(net, "class_embedding", None) is None else c["class_labels"]


def teacher(denoiser: Denoiser, net: Network, shape: tuple[int, ...], parts: Parts, family: Family) -> Teacher:
    """A teacher whose samples are the images themselves, [C, H, W] in [-1, 1]."""
    return Teacher(denoiser, encoder(net), lambda x: x.clamp(-1, 1), lambda images, eps: images, shape, parts, family)


def encoder(net: Network) -> Callable[[Sequence[int]], Condition]:
    """encode(labels) -> the condition of B labels."""
    return lambda labels: {"class_labels": torch.as_tensor(labels, device=net.device).long()}


def null_label(parts: Parts) -> int | None:
    """The label for "no label" of a folder's distill.json. ValueError if the network does not know it."""
    known = parts.net.config.get("num_class_embeds")
    null = fields.facts(parts.folder).get("null_class")
    if known is not None and null is not None and null >= known:
        path = parts.folder / "distill.json"
        raise ValueError(f"{path}: null_class is {null}, and the network knows the labels 0 .. {known - 1}: correct it")
    return null


def examples(teacher: Teacher) -> tuple[int, ...]:
    """The labels of an export's verification: the first eight classes, or all if there are fewer."""
    net = teacher.denoiser.net
    null = teacher.denoiser.null
    labelled = getattr(net, "class_embedding", None) is not None
    count = config_of(net).get("num_class_embeds") if labelled else None
    no_label = None if null is None else int(null["class_labels"])
    return tuple(label for label in range(8 if count is None else count) if label != no_label)[:8] or (0,)


def sample(
    pipe: Pipeline, labels: Sequence[int], z: Tensor, steps: int, guidance: float, negative: str | None = None
) -> Tensor:
    """Images [B, C, H, W] in [0, 1] of a ConsistencyModelPipeline from unit noise z. Guidance is built in."""
    noise = z * pipe.scheduler.init_noise_sigma
    pipe.prepare_latents = lambda *args, **options: noise  # `latents=` requires three channels
    images = pipe(len(z), class_labels=list(labels), num_inference_steps=steps, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def render_call(steps: int, label: str | int) -> str:
    """The call in a model card; it assigns `image`."""
    return f"image = pipe(class_labels=[{label}], num_inference_steps={steps}).images[0]"


def condition(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the condition of one sample."""
    return {"class_labels": ()} if config.num_class_embeds else {}
