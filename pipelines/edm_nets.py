"""The DDPM++ network that Karras et al. 2022 trained for CIFAR-10, FFHQ and AFHQv2 (arXiv 2206.00364, appendix F).

The architecture is that of Song et al. 2021 (arXiv 2011.13456), after Ho et al. 2020. UNet2DModel cannot represent it:
blocks that change the resolution have a learned 1x1 shortcut here, and none in UNet2DModel (or one with NCSN++'s filter
1 3 3 1), and a label is added to the noise level before the first layer of the embedding. So it is a diffusers model of
this project, and a ConsistencyModelPipeline loads it wherever this project is installed. ADM, the network of
ImageNet-64, is a UNet2DModel and needs nothing from here.

An export names the module pipelines.edm_nets in a checkout and distill.pipelines.edm_nets in the wheel. The module
registers itself under both names, so that either export loads after this module is imported, as `pipelines.load` does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from pipelines.components import EDM_NETS

EPS = 1e-6
sys.modules.update(dict.fromkeys(EDM_NETS, sys.modules[__name__]))


def groups(channels: int) -> int:
    """At most 32 groups with at least four channels each."""
    return min(32, channels // 4)


class Block(nn.Module):
    """A residual block, optionally with single-head self-attention. Each sum is divided by sqrt(2)."""

    def __init__(
        self, channels: tuple[int, int], embedding: int, dropout: float, attention: bool = False, **resample: bool
    ) -> None:
        super().__init__()
        self.channels, out = channels
        self.resnet = ResnetBlock2D(
            in_channels=self.channels,
            out_channels=out,
            temb_channels=embedding,
            groups=groups(self.channels),
            groups_out=groups(out),
            eps=EPS,
            dropout=dropout,
            output_scale_factor=math.sqrt(2),
            kernel="sde_vp",
            use_in_shortcut=True if resample else None,
            **resample,
        )
        self.attention = None
        if attention:
            self.attention = Attention(
                out,
                heads=1,
                dim_head=out,
                norm_num_groups=groups(out),
                eps=EPS,
                bias=True,
                residual_connection=True,
                rescale_output_factor=math.sqrt(2),
            )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resnet(x, embedding)
        return x if self.attention is None else self.attention(x)


class SongUNet(ModelMixin, ConfigMixin):
    """DDPM++: F(c_in x, 250 ln sigma, label), called like a UNet2DModel. The defaults are those of CIFAR-10.

    widths      channels at each resolution, from sample_size down by halves; stem: channels of the first convolution.
    attention   resolutions with self-attention: all encoder blocks, the last decoder block.
    labels      in [0, num_class_embeds); augment_dim: size of the vector that describes the input's augmentation.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        stem: int = 128,
        widths: Sequence[int] = (256, 256, 256),
        layers: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.13,
        num_class_embeds: int | None = None,
        augment_dim: int = 0,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        # its input is 250 ln sigma, as in ConsistencyModelPipeline: EDM's c_noise is ln(sigma) / 4
        self.time_proj = Timesteps(stem, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1e-3)
        self.time_embedding = TimestepEmbedding(stem, 4 * stem)
        self.class_embedding = nn.Embedding(num_class_embeds, stem) if num_class_embeds else None
        self.augment_embedding = nn.Linear(augment_dim, stem, bias=False) if augment_dim else None

        self.conv_in = nn.Conv2d(in_channels, stem, 3, padding=1)
        self.down = nn.ModuleDict()
        self.up = nn.ModuleDict()
        skips = [stem]
        width = stem

        def add(side: nn.ModuleDict, name: str, out: int, skip: int = 0, **options: bool) -> None:
            nonlocal width
            side[name] = Block((width + skip, out), 4 * stem, dropout, **options)
            width = out

        sizes = [sample_size >> level for level in range(len(widths))]
        for size, out in zip(sizes, widths, strict=True):
            if size != sample_size:
                add(self.down, f"{size}x{size}_down", width, down=True)
                skips.append(width)
            for i in range(layers):
                add(self.down, f"{size}x{size}_block{i}", out, attention=size in attention)
                skips.append(width)
        add(self.up, f"{size}x{size}_in0", width, attention=True)
        add(self.up, f"{size}x{size}_in1", width)
        for size, out in zip(reversed(sizes), reversed(widths), strict=True):
            if size != sizes[-1]:
                add(self.up, f"{size}x{size}_up", width, up=True)
            for i in range(layers + 1):
                add(self.up, f"{size}x{size}_block{i}", out, skips.pop(), attention=i == layers and size in attention)
        self.conv_norm_out = nn.GroupNorm(groups(width), width, eps=EPS)
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, C, H, W]; timestep number or [B]; class_labels [B]; augment_labels [B, augment_dim], None: 0."""
        told = self.time_proj(torch.as_tensor(timestep, device=sample.device).expand(len(sample))).to(sample.dtype)
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(f"num_class_embeds is {self.config.num_class_embeds} and class_labels is {class_labels}")
        if self.class_embedding is not None:
            told = told + self.class_embedding(class_labels)
        if self.augment_embedding is not None:  # always called, so that it always has a gradient
            none = told.new_zeros(len(told), self.augment_embedding.in_features)
            told = told + self.augment_embedding(none if augment_labels is None else augment_labels)
        embedding = self.time_embedding(told)

        x = self.conv_in(sample)
        skips = [x]
        for block in self.down.values():
            x = self._run(block, x, embedding)
            skips.append(x)
        for block in self.up.values():
            x = x if x.shape[1] == block.channels else torch.cat([x, skips.pop()], dim=1)
            x = self._run(block, x, embedding)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _run(self, block: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x, embedding)
        return block(x, embedding)
