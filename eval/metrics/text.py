"""The agreement of images with their prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eval.metrics.intervals import Score, mean_score
from eval.metrics.sets import chunks, count_rows, normalise_rows, validate_pair

if TYPE_CHECKING:
    from eval.metrics.sets import Set


def text_score(images: Set, texts: Set, scale: float = 1.0) -> Score:
    """scale times the mean cosine of image i and prompt i (Hessel et al. 2021, arXiv 2104.08718, not cut at 0)."""
    validate_pair(images, texts, 2)
    if count_rows(images) != count_rows(texts):
        raise ValueError(f"{count_rows(images)} images and {count_rows(texts)} prompts; one prompt per image is needed")
    cosines = [(a * b).sum(1) for a, b in zip(normalise_rows(chunks(images)), normalise_rows(chunks(texts)))]
    return mean_score(scale * torch.cat(cosines))
