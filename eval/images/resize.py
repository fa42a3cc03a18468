"""Resize an image for an extractor by a rule, a short text such as "short-bicubic:224 crop:224".

A protocol's own crop and size, `eval.protocols.Preparation`, are applied before.

crop:N        centre crop to N x N
lanczos:N, bicubic:N, bilinear:N, box:N        to N x N by Pillow, rounded to 8 bits
short-bicubic:N, ...                           the short edge to N, the other in proportion, rounded to 8 bits
clean:N       to N x N, bicubic with antialiasing, each channel in float32, clipped to 0..255, not rounded: clean-fid's
              (Parmar et al. 2022, arXiv 2104.11222)
gray          one channel (the others work on RGB)
exact:N       nothing; any size other than N x N is an error
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FILTERS = ("lanczos", "bicubic", "bilinear", "box")
SIZED = ("crop", "clean", "exact", *FILTERS, *(f"short-{f}" for f in FILTERS))
BARE = ("gray",)


@cache
def parse(rule: str) -> tuple[tuple[str, int], ...]:
    """The steps of a rule as (name, size), size 0 if it has none. ValueError for an unknown step."""
    steps = []
    for step in rule.split():
        name, colon, size = step.partition(":")
        if colon and (name not in SIZED or not size.isdecimal() or int(size) < 1) or not colon and name not in BARE:
            allowed = ", ".join([*BARE, *(f"{s}:N" for s in SIZED)])
            raise ValueError(f"resize rule {rule!r}: {step!r} is no step; there are {allowed}")
        steps.append((name, int(size or 0)))
    if any(name == "clean" for name, _ in steps[:-1]):
        raise ValueError(f"resize rule {rule!r}: clean must be the last step, for its result is not 8 bits")
    return tuple(steps)


def resize(image: Image, rule: str = "") -> np.ndarray:
    """A Pillow image -> float32 [C, H, W] in 0..255, C = 3, or 1 after gray. ValueError for a size unlike exact:N."""
    from PIL.Image import Resampling

    steps = parse(rule)
    image = image.convert("L" if ("gray", 0) in steps else "RGB")
    for name, size in steps:
        width, height = image.size
        if name == "exact" and image.size != (size, size):
            raise ValueError(f"the image is {width} x {height}, this extractor takes {size} x {size} only")
        elif name == "crop":
            image = _centre(image, size)
        elif name == "clean":
            return _clean(image, size)
        elif name in FILTERS:
            image = image.resize((size, size), Resampling[name.upper()])
        elif name.startswith("short-"):
            short = min(width, height)
            sides = (size * width // short, size * height // short)
            image = image.resize(sides, Resampling[name.removeprefix("short-").upper()])
    return _planes(np.asarray(image, np.float32))


def _centre(image: Image, size: int) -> Image:
    left = round((image.width - size) / 2)
    top = round((image.height - size) / 2)  # as torchvision rounds
    return image.crop((left, top, left + size, top + size))


def _clean(image: Image, size: int) -> np.ndarray:
    from PIL.Image import Resampling, fromarray

    planes = _planes(np.asarray(image, np.float32))
    resized = [np.asarray(fromarray(p).resize((size, size), Resampling.BICUBIC)) for p in planes]
    return np.stack(resized).clip(0, 255)


def _planes(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
