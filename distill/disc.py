"""Discriminator heads over features that a denoiser was tapped for."""

from __future__ import annotations

import math

from torch import Tensor, nn


class Float(nn.Sequential):
    """Layers that take features of any precision and work in that of their weights."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.to(next(self.parameters()).dtype))


class Head(Float):
    """DMD2's classifier: halve `strided` times, collapse 4x4 to 1x1, one logit. Features [B, C, S, S] -> [B, 1, 1, 1].

    S = 4 * 2**strided. Every convolution is followed by group normalisation and SiLU (Yin et al. 2024, appendix).
    """

    def __init__(self, channels: int, strided: int = 0, groups: int = 32) -> None:
        def block(stride: int, padding: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, channels, 4, stride, padding), nn.GroupNorm(groups, channels), nn.SiLU()]

        layers = [layer for _ in range(strided) for layer in block(2, 1)] + block(4, 0)
        super().__init__(*layers, nn.Conv2d(channels, 1, 1))


def head(feature: Tensor) -> nn.Module:
    """A head for features shaped like `feature`: [1, C, S, S] gives DMD2's, [1, C] a two-layer perceptron."""
    channels = feature.shape[1]
    if feature.ndim == 2:
        return Float(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))
    side = feature.shape[-1]
    strided = round(math.log2(side / 4)) if side >= 4 else -1
    if feature.ndim != 4 or feature.shape[-2] != side or strided < 0 or 4 * 2**strided != side:
        raise ValueError(
            f"the tapped feature has shape {tuple(feature.shape)}; a head needs [B, C] or [B, C, S, S] with S 4, 8, ..."
        )
    groups = math.gcd(32, channels // 8)  # of 8 channels or more: on a 1x1 map a group of one is always zero
    return Head(channels, strided, groups)
