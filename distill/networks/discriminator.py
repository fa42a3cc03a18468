"""Discriminator heads over features that a denoiser was tapped for: image maps, tokens, video, vectors.

A head has the width of its features, and its logit is a mean over places where more than one is left: a map whose side
is not 4, 8, 16, ... is halved until its smaller side is below 8 and judged by its 4x4 patches; of tokens and of the
frames of a video each is judged alone, for attention has already told it of the others. With `places` every place keeps
a logit of its own, [B, places]: a loss that is not linear then sees each (LADD's hinge).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser, Taps
from distill.diffusion.times import Law
from distill.random import Draw


class Float(nn.Sequential):
    """Layers that take features of any precision and work in that of their weights."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.to(next(self.parameters()).dtype))


class Head(Float):
    """DMD2's classifier: halve `strided` times, collapse 4x4 to 1x1, a logit. [B, C, (T,) H, W] -> [B, 1, 1, 1].

    H = W = 4 * 2**strided is DMD2's. Every convolution is followed by group normalisation and SiLU (Yin et al. 2024,
    appendix). kernel: of the collapsing one; less than 4 where a side is.
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
        if features.ndim == 5:  # frames are images
            features = features.transpose(1, 2).flatten(0, 1)
        logits = super().forward(features).reshape(B, -1)
        return logits if self.places else logits.mean(1).reshape(B, 1, 1, 1)


class Tokens(Float):
    """A two-layer perceptron on each normalised token, and the mean of their logits. [B, N, C] -> [B, 1]."""

    def __init__(self, channels: int, places: bool = False) -> None:
        super().__init__(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))
        self.places = places

    def forward(self, features: Tensor) -> Tensor:
        logits = super().forward(features)
        return logits.flatten(1) if self.places else logits.mean(1)


class Pixels(nn.Module):
    """PCM's head: two 1x1 convolutions, the second with a way around it, and a logit of each place. -> [B, places].

    Each is followed by group normalisation and leaky ReLU. Features are maps, video, tokens [B, N, C] or [B, C].
    """

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()

        def layer() -> nn.Module:
            return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GroupNorm(groups, channels), nn.LeakyReLU())

        self.conv1, self.conv2, self.conv_out = layer(), layer(), nn.Conv2d(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = features.transpose(1, 2) if features.ndim == 3 else features
        x = self.conv1(x.reshape(*x.shape[:2], -1, 1).to(self.conv_out.weight.dtype))
        return self.conv_out(self.conv2(x) + x).flatten(1)


def pixels(feature: Tensor) -> Pixels:
    """PCM's head for features shaped like `feature`."""
    channels, places = feature.shape[2 if feature.ndim == 3 else 1], count(feature)
    groups = 32 if places > 1 and channels % 32 == 0 else math.gcd(32, max(channels // 8, 1))
    return Pixels(channels, groups)  # a group of one number is zero


def count(feature: Tensor) -> int:
    """Places of a feature: pixels, frames of pixels or tokens."""
    return feature.shape[1] if feature.ndim == 3 else math.prod(feature.shape[2:])


def head_logits(disc: nn.Module, features: Sequence[Tensor]) -> Sequence[Tensor]:
    """The logits [B, places] of each of several heads of `pixels`."""
    return disc(*features).split([count(feature) for feature in features], dim=1)


def head(feature: Tensor, places: bool = False) -> nn.Module:
    """A head for features shaped like `feature`: [1, C, H, W], video [1, C, T, H, W], tokens [1, N, C] or [1, C]."""
    match feature.ndim:
        case 2:
            channels = feature.shape[1]
            return Float(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))
        case 3:
            return Tokens(feature.shape[2], places)
        case 4 | 5:
            channels, (height, width) = feature.shape[1], feature.shape[-2:]
            strided = max(0, int(math.log2(min(height, width) / 4)))
            groups = math.gcd(32, max(channels // 8, 1))  # of 8 channels or more: on a 1x1 map, of one it is zero
            return Head(channels, strided, groups, (min(4, height), min(4, width)), places)
    raise ValueError(
        f"the tapped feature has shape {tuple(feature.shape)}; a head needs [B, C], tokens [B, N, C], "
        "maps [B, C, H, W] or video [B, C, T, H, W]: tap another module"
    )


class Heads(nn.ModuleList):
    """A head for each of several tapped modules; their logits side by side, [B, all heads and places]."""

    def forward(self, *features: Tensor) -> Tensor:
        return torch.cat([head(f).flatten(1) for head, f in zip(self, features, strict=True)], dim=1)


def build_heads(features: Sequence[Tensor], places: bool = False, of_pixels: bool = False) -> nn.Module:
    """What reads these features, called disc(*features): the head itself where there is one, else Heads."""
    made = [pixels(feature) if of_pixels else head(feature, places) for feature in features]
    return made[0] if len(made) == 1 else Heads(made)


def noised_features(
    denoiser: Denoiser, taps: Taps, times: Law, x: Tensor, c: Condition, draw: Draw, *names: str
) -> list[Tensor]:
    """What a discriminator sees of samples x: features of alpha_u x + sigma_u eps, whose u and eps are x's own.

    x [B len(names), ...]: one pass for groups of B samples; u and eps of a group are the draws "NAME_t", "NAME_eps".
    """
    path, B, shape = denoiser.path, len(x) // len(names), x[: len(x) // len(names)].shape
    u = torch.cat([times(draw, f"{name}_t", B, path) for name in names])
    eps = torch.cat([draw.normal(f"{name}_eps", shape) for name in names]).to(x)
    return denoiser.features(path.diffuse(x, eps, u), u, c, taps)


@torch.no_grad()
def accuracy(fake: Tensor, real: Tensor) -> Tensor:
    """The share of logits with the right sign, below 0 for fakes and above for real ones, in [0, 1]."""
    return ((fake < 0).float().mean() + (real > 0).float().mean()) / 2
