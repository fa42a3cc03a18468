"""Discriminator heads over features that a denoiser was tapped for: image maps, tokens, video, vectors.

A head has the width of its features, and its logit is a mean over places where more than one is left: a map whose side
is not 4, 8, 16, ... is halved until its smaller side is below 8 and judged by its 4x4 patches; of tokens and of the
frames of a video each is judged alone, for attention has already told it of the others.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


class Float(nn.Sequential):
    """Layers that take features of any precision and work in that of their weights."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.to(next(self.parameters()).dtype))


class Head(Float):
    """DMD2's classifier: halve `strided` times, collapse 4x4 to 1x1, a logit. [B, C, (T,) H, W] -> [B, 1, 1, 1].

    H = W = 4 * 2**strided is DMD2's. Every convolution is followed by group normalisation and SiLU (Yin et al. 2024,
    appendix). kernel: of the collapsing one; less than 4 where a side is.
    """

    def __init__(self, channels: int, strided: int = 0, groups: int = 32, kernel: tuple[int, int] = (4, 4)) -> None:
        def block(kernel: tuple[int, int], stride: int, padding: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, channels, kernel, stride, padding), nn.GroupNorm(groups, channels), nn.SiLU()]

        layers = [layer for _ in range(strided) for layer in block((4, 4), 2, 1)] + block(kernel, 1, 0)
        super().__init__(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        B = len(features)
        if features.ndim == 5:  # frames are images
            features = features.transpose(1, 2).flatten(0, 1)
        return super().forward(features).reshape(B, -1).mean(1).reshape(B, 1, 1, 1)


class Tokens(Float):
    """A two-layer perceptron on each normalised token, and the mean of their logits. [B, N, C] -> [B, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).mean(1)


def head(feature: Tensor) -> nn.Module:
    """A head for features shaped like `feature`: [1, C, H, W], video [1, C, T, H, W], tokens [1, N, C] or [1, C]."""
    match feature.ndim:
        case 2:
            channels = feature.shape[1]
            return Float(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))
        case 3:
            return Tokens(feature.shape[2])
        case 4 | 5:
            channels, (height, width) = feature.shape[1], feature.shape[-2:]
            strided = max(0, int(math.log2(min(height, width) / 4)))
            groups = math.gcd(32, max(channels // 8, 1))  # of 8 channels or more: on a 1x1 map, of one it is zero
            return Head(channels, strided, groups, (min(4, height), min(4, width)))
    raise ValueError(
        f"the tapped feature has shape {tuple(feature.shape)}; a head needs [B, C], tokens [B, N, C], "
        "maps [B, C, H, W] or video [B, C, T, H, W]: tap another module"
    )
