"""Saturation and contrast of images, and their drift from a teacher's images of the same prompts and noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eval.metrics.intervals import Score, mean_score

Picture = Callable[[int], Tensor]  # i -> [1, 3, H, W] in [-1, 1], sRGB
XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
WHITE = (0.95047, 1.0, 1.08883)  # D65
CHANNELS = ("red", "green", "blue")


def lab(image: Tensor) -> Tensor:
    """CIELAB [3, H, W] of an sRGB image [1, 3, H, W] in [-1, 1]: lightness from 0 to 100, two axes of colour."""
    x = (image[0].double() + 1) / 2
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,jhw->ihw", x.new_tensor(XYZ), linear) / x.new_tensor(WHITE)[:, None, None]
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=0) ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def colour_values(image: Tensor) -> Tensor:
    """[8] of an image: mean chroma, standard deviation of the lightness, then means and spreads of red, green, blue.

    Chroma and lightness are CIELAB's; means and standard deviations of the channels are in levels from 0 to 255.
    """
    light, a, b = lab(image)
    levels = (image[0].double() + 1) * 127.5
    spread = levels.flatten(1).std(1, correction=0)
    return torch.cat(
        [torch.stack([(a * a + b * b).sqrt().mean(), light.std(correction=0)]), levels.mean((1, 2)), spread]
    )


def colour(picture: Picture, count: int) -> dict[str, Score]:
    """Mean chroma and contrast of the images, with Student's t over images."""
    values = torch.stack([colour_values(picture(i)) for i in range(count)])
    return {"chroma": mean_score(values[:, 0]), "contrast": mean_score(values[:, 1])}


def drift(picture: Picture, teacher: Picture, count: int) -> dict[str, Score]:
    """The mean difference of image i and the teacher's image i in each of `colour_values`, t over images.

    ValueError if the images differ in size.
    """
    rows = []
    for i in range(count):
        pair = picture(i), teacher(i)
        if pair[0].shape != pair[1].shape:
            sizes = " and ".join(f"{image.shape[3]} x {image.shape[2]}" for image in pair)
            raise ValueError(f"image {i} and the teacher's are {sizes} pixels; drift needs one size")
        rows.append(colour_values(pair[0]) - colour_values(pair[1]))
    names = ["chroma", "contrast", *(f"{c}_mean" for c in CHANNELS), *(f"{c}_spread" for c in CHANNELS)]
    return {f"{name}_drift": mean_score(values) for name, values in zip(names, torch.stack(rows).T, strict=True)}
