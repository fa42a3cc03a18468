"""A network of a few hundred weights for vectors [B, d], the same on every machine."""

import torch
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.random import Draw


class Tiny(nn.Module):
    """out(x, native time, label, guidance), smooth in all of them. `mid` is there to be tapped or adapted."""

    def __init__(self, d=2, width=16, classes=0):
        super().__init__()
        self.first = nn.Linear(d + 3, width)
        self.mid = nn.Linear(width, width)
        self.last = nn.Linear(width, d)
        self.label = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, x, t, label=None, guidance=None):
        t = t.to(x.dtype)[:, None]
        w = torch.zeros_like(t) if guidance is None else guidance.to(x.dtype)[:, None]
        h = torch.tanh(self.first(torch.cat([x, t.log1p() / 4, t / (1 + t), w / 8], dim=1)))
        if self.label is not None:
            h = h + self.label(label)
        return self.last(torch.tanh(self.mid(h)))


def filled(net, seed=0, dtype=torch.float32):
    """The network with normal weights of size 1 / sqrt(fan-in) and small biases, drawn by name."""
    for name, p in net.named_parameters():
        draw = Draw(seed, 0, "weights", torch.arange(len(p)))
        p.data = (draw.normal(name, tuple(p.shape)) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)).to(dtype)
    return net.to(dtype)


def tiny(schedule, kind="v", seed=0, dtype=torch.float64, classes=0, **sizes):
    """A denoiser around it. With `classes` its condition is {"label": [B]}, and label `classes` is none."""
    null = {"label": torch.tensor([classes])} if classes else None
    return Denoiser(filled(Tiny(classes=classes, **sizes), seed, dtype), schedule, kind, null=null)


class TimestepEmbedding(nn.Linear):
    """Named as diffusers' embedding of time, so that distill.diffusion.end_time.add_end_time finds it."""


class Clock(nn.Module):
    """out(x, native time, label), the time embedded apart."""

    def __init__(self, d=2, width=16, classes=0):
        super().__init__()
        self.first = nn.Linear(d, width)
        self.time = TimestepEmbedding(2, width)
        self.last = nn.Linear(width, d)
        self.label = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, x, t, label=None):
        t = t.to(x.dtype)[:, None]
        h = torch.tanh(self.first(x) + self.time(torch.cat([t.log1p() / 4, t / (1 + t)], dim=1)))
        return self.last(h if self.label is None else h + self.label(label))


def clock(schedule, kind="v", seed=0, dtype=torch.float64, classes=0, **sizes):
    """`tiny` with a network that can be given a second time."""
    null = {"label": torch.tensor([classes])} if classes else None
    return Denoiser(filled(Clock(classes=classes, **sizes), seed, dtype), schedule, kind, null=null)


class Reader(nn.Module):
    """out(x, native time, words): a layer of cross-attention of diffusers between two of Tiny's."""

    def __init__(self, d=2, width=16, D=4):
        from diffusers.models.attention_processor import Attention

        super().__init__()
        self.first = nn.Linear(d + 2, width)
        self.attn2 = Attention(width, D, heads=2, dim_head=width // 2)
        self.mid = nn.Linear(width, width)
        self.last = nn.Linear(width, d)

    def forward(self, x, t, prompt_embeds):
        t = t.to(x.dtype)[:, None]
        h = torch.tanh(self.first(torch.cat([x, t.log1p() / 4, t / (1 + t)], dim=1)))[:, None]
        h = h + self.attn2(h, encoder_hidden_states=prompt_embeds)
        return self.last(torch.tanh(self.mid(h)))[:, 0]


WORDS = 3  # of a text


def reader(schedule, kind="v", seed=0, dtype=torch.float64, classes=0, **sizes):
    """A denoiser around it. Its condition is {"prompt_embeds": [B, WORDS, D]}: `spoken` makes it of labels."""
    return Denoiser(filled(Reader(**sizes), seed, dtype), schedule, kind, null=spoken(torch.tensor([classes]), dtype))


def spoken(label, dtype=torch.float32, D=4):
    """The words of a label [B]."""
    draw = Draw(0, 0, "words", label)
    return {"prompt_embeds": draw.normal("words", (len(label), WORDS, D)).to(dtype)}


class Steered(Tiny):
    """out(x, native time, label, guidance) with an adapter to a control [B, 1]."""

    def __init__(self, d=2, width=16, classes=0):
        super().__init__(d, width, classes)
        self.control = nn.Linear(1, d)

    def forward(self, x, t, label=None, guidance=None, control=None):
        out = super().forward(x, t, label, guidance)
        return out if control is None else out + self.control(control.to(out))


def steered(schedule, kind="v", seed=0, dtype=torch.float64, classes=0, **sizes):
    """`tiny` with a network whose adapter alone a student trains."""
    null = {"label": torch.tensor([classes])} if classes else None
    return Denoiser(filled(Steered(classes=classes, **sizes), seed, dtype), schedule, kind, null=null)
