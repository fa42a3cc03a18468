"""How different the generated images are: the Vendi score, and distances of images of one prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eval.metrics.frechet import symmetric_eigen
from eval.metrics.intervals import Score, influence_interval, mean_score
from eval.metrics.sets import chunks, count_rows, normalise_rows, validate_features

if TYPE_CHECKING:
    from eval.metrics.sets import Set


def vendi(x: Set, strata: Tensor | None = None) -> Score:
    """Vendi score (Friedman & Dieng 2022, arXiv 2210.02410): exp of the entropy of the eigenvalues of K / n, cosine K.

    The effective number of different images, by the D x D matrix M = E x x^T that has the same eigenvalues. Influence:
    psi = score (-x.log(M) x - H). It grows with n until the model's modes are seen.
    """
    width = validate_features(x, "generated", 2)
    second = torch.zeros(width, width, dtype=torch.float64)
    for part in normalise_rows(chunks(x)):
        second += part.T @ part / count_rows(x)
    values, vectors = symmetric_eigen(second, "the matrix of cosines")
    keep = values > 1e-12
    values = values[keep]
    vectors = vectors[:, keep]
    entropy = -(values * values.log()).sum()
    number = entropy.exp()
    psi = (number * (-((part @ vectors).square() @ values.log()) - entropy) for part in normalise_rows(chunks(x)))
    return influence_interval(number.item(), psi, strata)


def diversity(x: Set, prompts: Tensor) -> Score:
    """The mean over prompts of the mean 1 - cosine of two images of one prompt and different seeds.

    prompts [N]: the number of each image's prompt. Interval: t over prompts. ValueError if none has two images.
    """
    validate_features(x, "generated", 2)
    ids, where, sizes = prompts.unique(return_inverse=True, return_counts=True)
    if len(prompts) != count_rows(x) or not (sizes > 1).any():
        raise ValueError("diversity needs one prompt number an image, and two images of some prompts")
    total = torch.zeros(0)
    start = 0
    for part in normalise_rows(chunks(x)):
        total = part.new_zeros(len(ids), part.shape[1]) if not len(total) else total
        total.index_add_(0, where[start : start + len(part)], part)
        start += len(part)
    total = total[sizes > 1]
    sizes = sizes[sizes > 1].double()
    similar = (total.square().sum(1) - sizes) / (sizes * (sizes - 1))
    return mean_score(1 - similar)._replace(n=count_rows(x))


def pair_diversity(
    images: Callable[[int], Tensor], prompts: Tensor, distance: Callable[[Tensor, Tensor], Tensor]
) -> Score:
    """As `diversity` by a distance of two images, such as LPIPS (Zhang et al. 2018, arXiv 1801.03924).

    images(i) -> [1, C, H, W] in [-1, 1]; distance(a, b) -> [1]. All pairs of a prompt; t over prompts.
    """
    means = []
    for prompt in prompts.unique():
        numbers = (prompts == prompt).nonzero()[:, 0].tolist()
        pictures = [images(i) for i in numbers]
        pairs = [(a, b) for i, a in enumerate(pictures) for b in pictures[:i]]
        if pairs:
            with torch.no_grad():
                means.append(torch.stack([distance(a, b).reshape(()).double().cpu() for a, b in pairs]).mean())
    if not means:
        raise ValueError("diversity needs two images of some prompts; generate several seeds of a prompt")
    return mean_score(torch.stack(means))._replace(n=len(prompts))
