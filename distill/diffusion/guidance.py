"""Guidance as a denoiser.

classifier-free; w = 1: none                 out = null + w (cond - null)
away from a worse network; s = 0: none       out = out + s (out - worse), for any w: s (cond - worse cond)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser, Taps, capture_features, first_output
from distill.diffusion.schedule import Prediction, Schedule, expand
from distill.random import Draw

OVERRIDE = "override."  # prefix of the keys that replace others for the teacher (SFD)


def merge(a: Condition, b: Condition) -> Condition:
    """Concatenate two conditions along the batch dimension."""
    return None if a is None or b is None else {key: torch.cat([a[key], b[key].to(a[key].dtype)]) for key in a}


def repeat_condition(c: Condition, n: int) -> Condition:
    """The condition c repeated n times along the batch dimension."""
    return None if c is None else {key: torch.cat([value] * n) for key, value in c.items()}


def with_override(c: dict[str, Tensor], told: dict[str, Tensor]) -> dict[str, Tensor]:
    """The condition c with the keys `told` added, which replace those of c for a teacher."""
    return c | {OVERRIDE + key: value for key, value in told.items()}


def null_of(null: Condition, c: Condition) -> Condition:
    """The null condition with the batch size of c. Keys that it lacks (a guidance embedding) are taken from c."""
    if null is None or c is None:
        raise ValueError(
            "guidance other than 1 needs a null condition, and so does CFG++, but this denoiser is unconditional or "
            "was trained without one; set the guidance to 1, or give the Denoiser a `null` with its condition's keys"
        )
    return {k: null[k].to(v.device, v.dtype).expand_as(v) if k in null else v for k, v in c.items()}


def drop(c: Condition, null: Condition, mask: Tensor) -> dict[str, Tensor]:
    """Replace the condition by null where mask [B] is True."""
    empty = null_of(null, c)
    assert c is not None and empty is not None
    return {k: torch.where(mask.reshape(-1, *[1] * (v.ndim - 1)), empty[k], v) for k, v in c.items()}


def relabel(c: dict[str, Tensor], classes: tuple[int, ...], draw: Draw, only: tuple[int, ...] = ()) -> Condition:
    """The condition c with its labels (or only the labels in `only`) replaced by uniform draws from `classes`."""
    new = torch.tensor(classes, device=draw.device)[draw.integers("class", len(classes))]
    old = torch.tensor(only, device=draw.device)
    change = lambda label: torch.where(torch.isin(label, old), new, label) if only else new
    return {key: change(value) if "label" in key else value for key, value in c.items()}


@dataclass(eq=False)
class WorseModelGuided(Denoiser):
    """Extrapolates away from a weaker network: out + s (out - worse). It costs one more call on B samples.

    PAG (Ahn et al. 2024, arXiv 2403.17377): `worse` has the same weights without self-attention (inference/pag.py). The
    scale of its repository is s + 1. Autoguidance (Karras et al. 2024, arXiv 2406.02507) uses another, worse network.
    Features are those of the better network.
    """

    worse: nn.Module = field(kw_only=True)
    s: float = field(kw_only=True)

    def __call__(self, x: Tensor, t: Tensor, c: Condition = None) -> Prediction:
        pred = self.predict_unguided(x, t, c)
        return replace(pred, out=pred.out + self.term(pred.out, x, t, c))

    def predict_unguided(self, x: Tensor, t: Tensor, c: Condition = None) -> Prediction:
        """The output of the better network."""
        return super().__call__(x, t, c)

    def term(self, out: Tensor, x: Tensor, t: Tensor, c: Condition) -> Tensor:
        """s (out - worse)."""
        return self.s * (out - replace(self, net=self.worse).predict_unguided(x, t, c).out)


@dataclass(eq=False)
class CFG:
    """A denoiser with guidance scale w: a float, or one number per sample [B]. Gradients flow through both branches.

    w = 1 calls only the conditional branch, w = 0 only the null branch. Any other w makes one call of 2B samples. If
    base is `WorseModelGuided`, its worse network gets one call of B samples under c: w does not multiply s.
    """

    base: Denoiser
    w: float | Tensor

    def __call__(self, x: Tensor, t: Tensor, c: Condition = None) -> Prediction:
        if isinstance(self.w, int | float) and self.w == 1:
            return self.base(x, t, c)
        if isinstance(self.w, int | float) and self.w == 0:
            return self.base(x, t, null_of(self.base.null, c))
        return self.predict_with_null(x, t, c)[0]

    def predict_with_null(self, x: Tensor, t: Tensor, c: Condition) -> tuple[Prediction, Prediction]:
        """The guided prediction and the null prediction, from one call of 2B samples."""
        away = self.base if isinstance(self.base, WorseModelGuided) else None
        ask = away.predict_unguided if away else self.base
        pred = ask(torch.cat([x, x]), torch.cat([t, t]), merge(c, null_of(self.base.null, c)))
        cond, empty = pred.out.chunk(2)
        w = expand(self.w, x) if isinstance(self.w, Tensor) else self.w
        out = empty + w * (cond - empty)
        out = out + away.term(cond, x, t, c) if away else out
        half: dict[str, Any] = {k: v.chunk(2)[0] for k, v in vars(pred).items() if isinstance(v, Tensor)}
        return replace(pred, **half | {"out": out}), replace(pred, **half | {"out": empty})

    def predict_with_features(self, x: Tensor, t: Tensor, c: Condition, taps: Taps) -> tuple[Prediction, list[Tensor]]:
        """The prediction, and the outputs [B, ...] of the named submodules under c itself for any w.

        Both are of the same forward pass. Only w = 0 needs a second pass under c, which ends at the last one.
        """
        taps = self.base.resolve_taps(taps)
        if not taps:
            return self(x, t, c), []
        if isinstance(self.w, int | float) and self.w == 1:
            return self.base.predict_with_features(x, t, c, taps)
        if isinstance(self.w, int | float) and self.w == 0:
            return self(x, t, c), self.base.features(x, t, c, taps)
        with capture_features(self.base.net, taps, False, getattr(self.base.call, "feature", first_output)) as found:
            pred = self(x, t, c)
        return pred, [found[name][: len(x)] for name in taps]

    def on_schedule(self, schedule: Schedule) -> CFG:
        return replace(self, base=self.base.on_schedule(schedule))

    @property
    def path(self) -> Schedule:
        return self.base.path


def scale_of(w: float | tuple[float, float], draw: Draw, B: int) -> float | Tensor:
    """A fixed guidance scale unchanged, or one drawn uniformly from the range (low, high) for every sample [B]."""
    if not isinstance(w, tuple):
        return w
    return w[0] + (w[1] - w[0]) * draw.uniform("guidance", (B,))


def with_guidance_key(c: Condition, w: float | Tensor) -> Condition:
    """The condition with a drawn guidance scale as the key "guidance" [B]; with a fixed w it is unchanged."""
    return (c or {}) | {"guidance": w} if isinstance(w, Tensor) else c


def embedding(w: Tensor, dim: int | None = 256) -> Tensor:
    """LCM's embedding [B, dim] of a guidance scale w [B]: sines, then cosines of 1000 w at geometric frequencies.

    dim: the network's time_cond_proj_dim. None means that the network takes no guidance scale: ValueError.
    """
    if dim is None:
        raise ValueError(
            "the network has no embedding of guidance (time_cond_proj_dim), and the method draws it from a range: load "
            "the teacher with pipelines.load(folder, guidance_embedded=True), or give one number"
        )
    half = dim // 2
    freq = torch.exp(torch.arange(half, dtype=torch.float64, device=w.device) * (-math.log(10000.0) / (half - 1)))
    phase = 1000.0 * w.double()[:, None] * freq
    return torch.cat([phase.sin(), phase.cos()], dim=1).float()
