"""Discriminator heads over features of a denoiser: image maps, tokens, video or vectors.

A head has the width of its features. Its logit is a mean over positions if more than one is left. A map whose side is
not 4, 8, 16, ... is halved until its smaller side is below 8; each 4x4 patch then gives a logit. Each token, and each
frame of a video, gives its own logit: attention has already mixed in the others. With `places` every position keeps
its logit, [B, places], so that a loss that is not linear sees each of them (LADD's hinge).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser, Taps
from distill.diffusion.times import TimeDistribution
from distill.random import Draw


class Float(nn.Sequential):
    """Layers that take features of any precision and compute in the precision of their weights."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.to(next(self.parameters()).dtype))


class Head(Float):
    """DMD2's classifier: halve `strided` times, reduce 4x4 to 1x1, then a logit. [B, C, (T,) H, W] -> [B, 1, 1, 1].

    H = W = 4 * 2**strided is DMD2's. Group normalisation and SiLU follow every convolution (Yin et al. 2024, appendix).
    kernel: kernel size of the last reduction; below 4 if a side is smaller.
    """

    def __init__(
        self,
        channels: int,
        strided: int = 0,
        groups: int = 32,
        kernel: tuple[int, int] = (4, 4),
        places: bool = False,
    ) -> None:
        def block(kernel: tuple[int, int], stride: int, padding: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, channels, kernel, stride, padding), nn.GroupNorm(groups, channels), nn.SiLU()]

        layers = [layer for _ in range(strided) for layer in block((4, 4), 2, 1)] + block(kernel, 1, 0)
        super().__init__(*layers, nn.Conv2d(channels, 1, 1))
        self.places = places

    def forward(self, features: Tensor) -> Tensor:
        B = len(features)
        if features.ndim == 5:  # frames are treated as images
            features = features.transpose(1, 2).flatten(0, 1)
        logits = super().forward(features).reshape(B, -1)
        return logits if self.places else logits.mean(1).reshape(B, 1, 1, 1)


class Tokens(Float):
    """A two-layer perceptron on each normalised token, then the mean of the logits. [B, N, C] -> [B, 1]."""

    def __init__(self, channels: int, places: bool = False) -> None:
        super().__init__(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))
        self.places = places

    def forward(self, features: Tensor) -> Tensor:
        logits = super().forward(features)
        return logits.flatten(1) if self.places else logits.mean(1)


class Pixels(nn.Module):
    """PCM's head: two 1x1 convolutions, the second with a skip connection, then a logit per position. -> [B, places].

    Group normalisation and leaky ReLU follow each. Features are maps, video, tokens [B, N, C] or vectors [B, C].
    """

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()

        def layer() -> nn.Module:
            return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GroupNorm(groups, channels), nn.LeakyReLU())

        self.conv1 = layer()
        self.conv2 = layer()
        self.conv_out = nn.Conv2d(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = features.transpose(1, 2) if features.ndim == 3 else features
        x = self.conv1(x.reshape(*x.shape[:2], -1, 1).to(self.conv_out.weight.dtype))
        return self.conv_out(self.conv2(x) + x).flatten(1)


def pixels(feature: Tensor) -> Pixels:
    """PCM's head for features shaped like `feature`."""
    channels = feature.shape[2 if feature.ndim == 3 else 1]
    places = count(feature)
    groups = 32 if places > 1 and channels % 32 == 0 else math.gcd(32, max(channels // 8, 1))
    return Pixels(channels, groups)  # a group of one number would give zero


def count(feature: Tensor) -> int:
    """Number of positions of a feature: pixels, pixels of all frames, or tokens."""
    return feature.shape[1] if feature.ndim == 3 else math.prod(feature.shape[2:])


def head_logits(disc: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
    """The logits [B, places] of each of several heads from `pixels`."""
    return list(disc(*features).split([count(feature) for feature in features], dim=1))


def head(feature: Tensor, places: bool = False) -> nn.Module:
    """A head for features shaped like `feature`: [1, C, H, W], video [1, C, T, H, W], tokens [1, N, C] or [1, C]."""
    match feature.ndim:
        case 2:
            channels = feature.shape[1]
            return Float(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))
        case 3:
            return Tokens(feature.shape[2], places)
        case 4 | 5:
            channels = feature.shape[1]
            height, width = feature.shape[-2:]
            strided = max(0, int(math.log2(min(height, width) / 4)))
            groups = math.gcd(32, max(channels // 8, 1))  # at least 8 channels: a group of one on 1x1 gives 0
            return Head(channels, strided, groups, (min(4, height), min(4, width)), places)
    raise ValueError(
        f"the tapped feature has shape {tuple(feature.shape)}; a head needs [B, C], tokens [B, N, C], "
        "maps [B, C, H, W] or video [B, C, T, H, W]: tap another module"
    )


class HeadList(nn.ModuleList):
    """A head for each of several tapped modules. Their logits are concatenated, [B, all heads and positions]."""

    def forward(self, *features: Tensor) -> Tensor:
        return torch.cat([head(f).flatten(1) for head, f in zip(self, features, strict=True)], dim=1)


def build_heads(features: Sequence[Tensor], places: bool = False, of_pixels: bool = False) -> nn.Module:
    """A module for these features, called as disc(*features): the head itself if there is only one, else HeadList."""
    made = [pixels(feature) if of_pixels else head(feature, places) for feature in features]
    return made[0] if len(made) == 1 else HeadList(made)


def noised_features(
    denoiser: Denoiser, taps: Taps, times: TimeDistribution, x: Tensor, c: Condition, draw: Draw, *names: str
) -> list[Tensor]:
    """Features of noised samples alpha_u x + sigma_u eps, the input of a discriminator. Every sample has its own u and
    eps.

    x [B len(names), ...]: groups of B samples in one pass. The draws of a group are "NAME_t" for u and "NAME_eps" for
    eps.
    """
    path = denoiser.path
    B = len(x) // len(names)
    shape = x[: len(x) // len(names)].shape
    u = torch.cat([times(draw, f"{name}_t", B, path) for name in names])
    eps = torch.cat([draw.normal(f"{name}_eps", shape) for name in names]).to(x)
    return denoiser.features(path.diffuse(x, eps, u), u, c, taps)


@torch.no_grad()
def accuracy(fake: Tensor, real: Tensor) -> Tensor:
    """The fraction in [0, 1] of logits with the right sign: negative for fakes, positive for reals."""
    return ((fake < 0).float().mean() + (real > 0).float().mean()) / 2
