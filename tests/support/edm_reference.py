"""Networks with the parameter names of the EDM checkpoints, and files of their layout: what the converter is held to.

Written from the papers (Ho 2020, Song 2021, Dhariwal & Nichol 2021, Karras 2022) in plain torch, apart from diffusers'
blocks. `dump` stores them as torch_utils.persistence does: a call of _reconstruct_persistent_obj on a dict.
"""

import contextlib
import pickle
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the file's code ran")


class Persistent(nn.Module):
    def __reduce_ex__(self, protocol):
        state = {name: value for name, value in self.__dict__.items() if name != "forward"}
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": type(self).__name__}
        return _reconstruct_persistent_obj, (meta | {"state": state},), None


class Linear(Persistent):
    def __init__(self, i, o, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i) / i**0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(o)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv2d(Persistent):
    """kernel 0: resampling alone."""

    def __init__(self, i, o, kernel, up=False, down=False):
        super().__init__()
        self.up, self.down = up, down
        self.weight = nn.Parameter(torch.randn(o, i, kernel, kernel) / (i * kernel**2) ** 0.5) if kernel else None
        self.bias = nn.Parameter(0.1 * torch.randn(o)) if kernel else None
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if up or down else None)

    def forward(self, x):
        if self.resample_filter is not None:
            f = self.resample_filter.expand(x.shape[1], 1, 2, 2)
            resample, f = (F.conv_transpose2d, 4 * f) if self.up else (F.conv2d, f)
            x = resample(x, f, stride=2, groups=len(f))
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class GroupNorm(Persistent):
    def __init__(self, channels, eps):
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), eps
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(channels))
        self.bias = nn.Parameter(0.1 * torch.randn(channels))

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class UNetBlock(Persistent):
    def __init__(self, i, o, emb, song, attention=False, up=False, down=False):
        super().__init__()
        self.in_channels, self.out_channels, self.song, self.dropout = i, o, song, 0.13
        self.skip_scale = np.sqrt(0.5) if song else 1  # a number of numpy, as in the published files
        eps = 1e-6 if song else 1e-5
        self.num_heads = (1 if song else o // 64) if attention else 0
        self.norm0, self.conv0 = GroupNorm(i, eps), Conv2d(i, o, 3, up, down)
        self.affine = Linear(emb, o if song else 2 * o)
        self.norm1, self.conv1 = GroupNorm(o, eps), Conv2d(o, o, 3)
        self.skip = None
        if i != o or up or down:
            self.skip = Conv2d(i, o, 1 if song or i != o else 0, up, down)
        if attention:
            self.norm2, self.qkv, self.proj = GroupNorm(o, eps), Conv2d(o, 3 * o, 1), Conv2d(o, o, 1)

    def forward(self, x, emb):
        total = lambda a, b: (a + b) / 2**0.5 if self.song else a + b
        told = self.affine(emb)[:, :, None, None]
        h = self.conv0(F.silu(self.norm0(x)))
        if self.song:
            h = self.norm1(h + told)
        else:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        x = total(x if self.skip is None else self.skip(x), self.conv1(F.silu(h)))
        if self.num_heads:
            B, C, H, W = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(B, self.num_heads, C // self.num_heads, 3, H * W).unbind(3)
            weights = (q.transpose(2, 3) @ k / q.shape[2] ** 0.5).softmax(dim=-1)
            x = total(x, self.proj((v @ weights.transpose(2, 3)).reshape(B, C, H, W)))
        return x


class SongUNet(Persistent):
    song = True

    def __init__(self, size, channels, stem, mults, blocks, attention, label_dim, augment_dim, label_dropout):
        super().__init__()
        self.label_dropout, emb = label_dropout, 4 * stem
        self.map_label = Linear(label_dim, stem if self.song else emb, bias=self.song) if label_dim else None
        self.map_augment = Linear(augment_dim, stem, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(stem, emb), Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{size}x{size}_conv"] = Conv2d(channels, stem, 3)
        block = lambda i, o, **options: UNetBlock(i, o, emb, self.song, **options)
        width, skips = stem, [stem]
        for level, mult in enumerate(mults):
            s = size >> level
            if level:
                self.enc[f"{s}x{s}_down"] = block(width, width, down=True)
                skips.append(width)
            for i in range(blocks):
                self.enc[f"{s}x{s}_block{i}"] = block(width, width := stem * mult, attention=s in attention)
                skips.append(width)
        for level, mult in reversed(list(enumerate(mults))):
            s = size >> level
            if level == len(mults) - 1:
                self.dec[f"{s}x{s}_in0"] = block(width, width, attention=True)
                self.dec[f"{s}x{s}_in1"] = block(width, width)
            else:
                self.dec[f"{s}x{s}_up"] = block(width, width, up=True)
            for i in range(blocks + 1):
                attends = s in attention and (i == blocks or not self.song)
                self.dec[f"{s}x{s}_block{i}"] = block(width + skips.pop(), width := stem * mult, attention=attends)
        if self.song:
            self.dec[f"{size}x{size}_aux_norm"] = GroupNorm(width, 1e-6)
            self.dec[f"{size}x{size}_aux_conv"] = Conv2d(width, channels, 3)
        else:
            self.out_norm, self.out_conv = GroupNorm(width, 1e-5), Conv2d(width, channels, 3)

    def embedding(self, c_noise, label, augment):
        half = self.map_layer0.weight.shape[1] // 2
        i = torch.arange(half, dtype=torch.float32).to(c_noise)
        angle = c_noise[:, None] * 10000 ** -(i / (half - 1 if self.song else half))
        e = torch.cat([angle.sin(), angle.cos()] if self.song else [angle.cos(), angle.sin()], dim=1)
        if self.map_augment is not None and augment is not None:
            e = e + self.map_augment(augment)
        if self.song and self.map_label is not None:
            e = e + self.map_label(label * label.shape[1] ** 0.5)
        e = self.map_layer1(F.silu(self.map_layer0(e)))
        if self.song or self.map_label is None:
            return F.silu(e)
        return F.silu(e + self.map_label(label))

    def forward(self, x, c_noise, label, augment=None):
        emb, skips = self.embedding(c_noise, label, augment), []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, UNetBlock):
                x = layer(x if x.shape[1] == layer.in_channels else torch.cat([x, skips.pop()], dim=1), emb)
        norm, conv = list(self.dec.values())[-2:] if self.song else (self.out_norm, self.out_conv)
        return conv(F.silu(norm(x)))


class DhariwalUNet(SongUNet):
    song = False


class EDMPrecond(Persistent):
    """D(x, sigma, label) with label [B, label_dim], one-hot or zero."""

    def __init__(
        self, kind, size=8, channels=3, label_dim=8, sigma_data=0.5, augment_dim=0, label_dropout=0, **options
    ):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = size, channels, label_dim
        self.use_fp16, self.sigma_min, self.sigma_max, self.sigma_data = False, 0, float("inf"), sigma_data
        self.model = kind(size, channels, **options, label_dim=label_dim, augment_dim=augment_dim,
                          label_dropout=label_dropout)  # fmt: skip

    def forward(self, x, sigma, label=None, augment=None):
        total = (sigma**2 + self.sigma_data**2)[:, None, None, None]
        out = self.model(x / total.sqrt(), sigma.log() / 4, label, augment)
        return self.sigma_data**2 / total * x + sigma[:, None, None, None] * self.sigma_data / total.sqrt() * out


def song(**options):
    small = {"stem": 16, "mults": (1, 3, 2), "blocks": 2, "attention": (4,)}
    return EDMPrecond(SongUNet, **small | options).eval()


def adm(**options):
    small = {"stem": 128, "mults": (1, 1, 2), "blocks": 2, "attention": (4, 2)}
    return EDMPrecond(DhariwalUNet, **small | options).eval()


class EasyDict(dict):
    pass


@contextlib.contextmanager
def posing_as(**homes):
    """For the time of a pickling, things of this file are of modules that nobody has."""
    names = {part for home in homes.values() for part in (home, home.rsplit(".", 1)[0])}
    modules = {name: types.ModuleType(name) for name in names}
    for name, home in homes.items():
        globals()[name].__module__ = home
        setattr(modules[home], name, globals()[name])
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in homes:
            globals()[name].__module__ = __name__
        for name in modules:
            del sys.modules[name]


def dump(net, file):
    """A checkpoint as the authors' training loop writes it."""
    with posing_as(_reconstruct_persistent_obj="torch_utils.persistence", EasyDict="dnnlib.util"):
        file.write_bytes(pickle.dumps({"ema": net, "loss_fn": None, "dataset_kwargs": EasyDict(name="cifar10")}))
    return file
