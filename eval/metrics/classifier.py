"""Figures of a classifier's logits: Inception Score and accuracy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eval.metrics.intervals import Score, mean_score, proportion
from eval.metrics.sets import chunks, count_rows, validate_features

if TYPE_CHECKING:
    from eval.metrics.sets import Set


def inception_score(logits: Set, splits: int = 10, seed: int = 2020) -> Score:
    """exp E KL(p(y|x) | p(y)) (Salimans et al. 2016, arXiv 1606.03498): the mean over disjoint splits, t interval.

    logits [N, K]. The images are shuffled as torch-fidelity shuffles them. ValueError for fewer than 2 a split.
    """
    n = count_rows(logits)
    validate_features(logits, "generated", 2 * splits, "logits")
    shuffled = torch.cat(list(chunks(logits, "logits")))
    shuffled = shuffled[torch.from_numpy(np.random.RandomState(seed).permutation(n))]
    log_p = shuffled.log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        marginal = part.exp().mean(0).log()
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    if splits == 1:
        return Score(scores[0].item(), -math.inf, math.inf, n)
    return mean_score(torch.stack(scores))._replace(n=n)


def accuracy(logits: Tensor, labels: Tensor) -> Score:
    """The share of images whose largest logit [N, K] is at the label [N] that was asked for."""
    if len(logits) != len(labels) or not len(labels):
        raise ValueError(f"{len(logits)} logits and {len(labels)} labels; one label per image is needed")
    validate_features(logits, "generated", 1)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels are {labels.min()} .. {labels.max()}, of {logits.shape[1]} classes; from 0 on")
    return proportion(logits.argmax(1) == labels)
