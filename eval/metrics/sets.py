"""Feature sets: a tensor [N, D] or `eval.features.extraction.Features`, which is read in chunks.

Moments and kernels need no more memory for more images. Arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from eval.features.extraction import Features

    Set = Tensor | Features


def chunks(x: Set, key: str = "features") -> Iterator[Tensor]:
    """A set as tensors [k, D] in float64, k <= 1000."""
    yield from (chunk.double() for chunk in x.split(1000)) if isinstance(x, Tensor) else x.chunks(key)


def count_rows(x: Set) -> int:
    return len(x) if isinstance(x, Tensor) else x.n


def read_rows(x: Set, index: Tensor | None = None) -> Tensor:
    """Some rows of a set, by default all, in float64."""
    if isinstance(x, Tensor):
        return (x if index is None else x[index]).double()
    return x.rows(index)


def draw_indices(of: int, n: int, seed: int = 0) -> Tensor:
    """n of `of` indices, drawn without replacement from the seed; all in order if there are at most n."""
    return torch.arange(of) if of <= n else torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:n]


def validate_features(x: Set, name: str, least: int, key: str = "features") -> int:
    """The number of features D. ValueError for another shape, fewer than `least` images, NaN or infinite features."""
    if isinstance(x, Tensor) and x.ndim != 2:
        raise ValueError(f"{name} features have shape {list(x.shape)}; [N, D] is needed")
    first = None
    start = 0
    for chunk in chunks(x, key):
        first = chunk.shape[1] if first is None else first
        if not torch.isfinite(chunk).all():
            bad = start + int((~torch.isfinite(chunk).all(1)).nonzero()[0])
            raise ValueError(f"{name} features of sample {bad} are NaN or infinite; find the step that made them")
        start += len(chunk)
    if start < least or first is None:
        raise ValueError(describe_shortage(name, start, first or 0, least))
    return first


def describe_shortage(name: str, n: int, width: int, least: int) -> str:
    """The message for a set with too few images."""
    kid = ", or measure kid, which needs 2 images for any number of features" if least > width > 0 else ""
    return f"{name} set has n = {n} samples of {width} features; at least {least} are needed: use more images{kid}"


def validate_pair(fake: Set, real: Set, least: int) -> int:
    wide = validate_features(fake, "generated", least), validate_features(real, "reference", least)
    if wide[0] != wide[1]:
        raise ValueError(f"the sets have {wide[0]} and {wide[1]} features; they must come from one extractor")
    return wide[0]


def normalise_rows(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    yield from (torch.nn.functional.normalize(part, dim=1) for part in parts)
