"""Data as pure functions of (seed, step, global sample index): nothing to save, nothing to lose on a restart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.draw import Draw

DIGITS_TRAIN = 1200  # of 1,797 scans; the other 597 are held out and never trained on


@cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's bundled handwritten digits: images [N, 1, 8, 8] in [-1, 1] and labels [N] of 0..9.

    `split` is "train" (1,200 scans) or "heldout" (597), one fixed random partition.
    """
    from sklearn.datasets import load_digits

    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pick = order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]
    images = torch.tensor(data.images[pick], dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target[pick])


@dataclass(frozen=True)
class Digits:
    """Conditions are uniform class labels; real images, with their own labels, are of the training split."""

    def check(self, needs: tuple[str, ...]) -> None:
        """Nothing can be missing."""

    def open(self, teacher: Any, needs: tuple[str, ...]) -> Digits:
        return self

    def fixed(self, n: int = 40) -> tuple[list[int], dict[str, Tensor]]:
        """Labels of a grid of samples, and their condition."""
        labels = torch.arange(n) % 10
        return labels.tolist(), {"class_labels": labels}

    def __call__(self, draw: Draw) -> dict[str, Any]:
        images, labels = digits("train")
        pick = draw.integers("real", len(labels)).cpu()
        return {
            "c": {"class_labels": draw.integers("label", 10)},
            "real": images[pick].to(draw.device),
            "real_c": {"class_labels": labels[pick].to(draw.device)},
        }
