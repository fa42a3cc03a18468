"""The agreement of images with their prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eval.metrics.intervals import Score, average
from eval.metrics.sets import _pair, _unit, chunks, count

if TYPE_CHECKING:
    from eval.metrics.sets import Set


def text_score(images: Set, texts: Set, scale: float = 1.0) -> Score:
    """scale times the mean cosine of image i and prompt i (Hessel et al. 2021, arXiv 2104.08718, not cut at 0)."""
    _pair(images, texts, 2)
    if count(images) != count(texts):
        raise ValueError(f"{count(images)} images and {count(texts)} prompts; one prompt per image is needed")
    found = [(a * b).sum(1) for a, b in zip(_unit(chunks(images)), _unit(chunks(texts)))]
    return average(scale * torch.cat(found))
