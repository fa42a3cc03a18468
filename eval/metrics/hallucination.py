"""Hallucinations between modes, by the variance of the teacher's x0 over noise levels: Aithal et al. 2024, 2406.09358.

    Hal(x) = mean over dimensions of Var_i x0_i        x0_i the predictions over a window of noise levels

A sampler of many steps has its own predictions: pass them to `variance`. For a sampler of one step,
`predict_x0_at_levels` (ours) adds noise of several levels to a sample, and a teacher predicts x0. The best levels
depend on the sampler and on the distance of the modes, so they have no default: calibrate them with `auc` on data with
known hallucinations. `rate` is the proportion of samples whose Hal exceeds that of 99 % of real images, by the same
teacher at the same levels.

python -m eval.hallucination --folder runs/images/dmd2 --reference runs/real --teacher runs/teacher --levels .1 .2 .3
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eval.metrics.intervals import Score, proportion

if TYPE_CHECKING:
    from distill.diffusion.denoiser import Condition, Denoiser


def variance(predictions: Tensor) -> Tensor:
    """Hal of samples [N] from predictions of x0 [T, N, ...], T >= 2: the window. ValueError for fewer, and for NaN."""
    if predictions.ndim < 3 or len(predictions) < 2:
        raise ValueError(f"predictions have shape {list(predictions.shape)}; [T, N, ...] with T >= 2 is needed")
    hal = predictions.double().var(0, correction=0).flatten(1).mean(1)
    if not torch.isfinite(hal).all():
        raise ValueError(f"the predictions of sample {int((~torch.isfinite(hal)).nonzero()[0])} are NaN or infinite")
    return hal


@torch.no_grad()
def predict_x0_at_levels(
    denoiser: Denoiser, x: Tensor, c: Condition, levels: Sequence[float], seed: int = 0, batch: int = 250
) -> Tensor:
    """Samples [N, ...] -> the denoiser's x0 [T, N, ...] at noise levels sigma / alpha, with fresh noise for each level.

    c: the condition of all N. The noise is a function of the seed and the numbers of the level and the sample.
    """
    if len(levels) < 2 or not all(0 < level < math.inf for level in levels):
        raise ValueError(f"levels are {list(levels)}; at least 2 ratios sigma / alpha above 0 are needed")
    out = []
    for i, level in enumerate(levels):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1000 * seed + i), dtype=x.dtype)
        t = denoiser.path.time(torch.full((len(x),), level, dtype=torch.float64))
        parts = []
        for pick in torch.arange(len(x)).split(batch):
            x_t = denoiser.path.diffuse(x[pick], noise[pick], t[pick])
            parts.append(denoiser(x_t, t[pick], None if c is None else {k: v[pick] for k, v in c.items()}).x0)
        out.append(torch.cat(parts))
    return torch.stack(out)


def auc(scores: Tensor, truth: Tensor) -> float:
    """The probability that a hallucination (truth [N] True) has a higher score [N] than another sample; ties half."""
    from scipy.stats import rankdata

    positive = int(truth.sum())
    if not 0 < positive < len(truth):
        raise ValueError(f"{positive} of {len(truth)} samples are hallucinations; both kinds are needed")
    if not torch.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinite values, which have no rank")
    ranks = torch.from_numpy(rankdata(scores.numpy()))
    return ((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * (len(truth) - positive))).item()


def rate(fake: Tensor, real: Tensor, quantile: float = 0.99) -> Score:
    """The proportion of generated Hal [N] above the quantile of real Hal [M], with Wilson's interval; 1 % for real."""
    for name, values in (("generated", fake), ("real", real)):
        if not len(values) or not torch.isfinite(values).all():
            raise ValueError(f"the {name} Hal of {len(values)} images holds NaN or infinite values, or none")
    return proportion(fake > real.quantile(quantile))


def hallucination(folder: Path, reference: Path, teacher: Path, levels: tuple[float, ...], seed: int = 0) -> Score:
    """The rate of a folder by a pixel-space teacher with class labels, such as the digits'.

    Args:
        folder: generated images, with the labels that were asked for.
        reference: real images with labels; they set the threshold.
        teacher: a pipeline's folder.
        levels: noise levels sigma / alpha of the window.
        seed: of the noise.
    """
    from eval.images.images import read_folder
    from pipelines import load

    model = load(str(teacher))

    def hal(path: Path) -> Tensor:
        images, labels, _ = read_folder(path)
        if labels is None or tuple(images.shape[1:]) != tuple(model.shape):
            raise ValueError(
                f"{path} must hold images {list(model.shape)} with labels for {teacher}; it holds "
                f"{list(images.shape[1:])}, {'no labels' if labels is None else 'labels'}"
            )
        net: Any = model.denoiser.net
        known = net.config.get("num_class_embeds")
        if known is not None and not 0 <= int(labels.min()) <= int(labels.max()) < known:
            raise ValueError(f"{path} has labels up to {int(labels.max())}, and {teacher} knows 0 .. {known - 1}")
        return variance(predict_x0_at_levels(model.denoiser, images, model.encode(labels.tolist()), levels, seed))

    return rate(hal(folder), hal(reference))


def main() -> None:
    """Command line of `hallucination`."""
    from rich.console import Console

    from eval.cli import run

    result = run(hallucination)
    Console().print(
        f"{result.value:.2%} beyond 99 % of real images ({result.low:.2%} to {result.high:.2%}, n = {result.n})"
    )
