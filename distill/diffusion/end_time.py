"""Networks with two time inputs: the average velocity F(x_t, t, r) of rectified flow from t down to r.

    x_t = (1 - t) x + t eps,    x_r = x_t - (t - r) F(x_t, t, r),    F(x_t, t, t) = dx_t/dt,  the plain velocity

The second time is the condition "end" [B], like "guidance". It is 0 at the data, and 0 if the condition lacks it. A
student's plain call is therefore F(., t, 0), which plain diffusers can sample, export and load.
A student of several calls without new noise between them passes the time of its next call (student.renoise "ddim").
Its export contains these end times in its time embedding (`fold_end_times`).
A negative end time is TwinFlow's sign: F(., t, -t) is the velocity of the student's own samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from distill.diffusion.denoiser import Call, Condition, Denoiser, Feature, first_output
from distill.diffusion.guidance import CFG, repeat_condition
from distill.diffusion.schedule import Flow, expand
from distill.modules import shallow_module_copy

SECOND = "end."  # prefix of the parameters that embed the second time
PATH = Flow()  # F is a velocity of this path; a denoiser of any schedule can be evaluated on it


def with_end_key(c: Condition, r: Tensor) -> Condition:
    """The condition with the second time r [B] in [-1, 1]."""
    return (c or {}) | {"end": r}


def average(denoiser: Denoiser | CFG, x: Tensor, t: Tensor, r: Tensor | None, c: Condition) -> Tensor:
    """F(x_t, t, r) [B, ...] of a denoiser on `PATH`. r None: the velocity of a network with one time input."""
    return denoiser(x, t, c if r is None else with_end_key(c, r)).flow


def integral(denoiser: Denoiser, x: Tensor, t: Tensor, r: Tensor, c: Condition, jumps: int) -> Tensor:
    """x_t - x_r [B, ...] by `jumps` equal jumps of F from t down to r. Times below 0 are 0 in F."""
    a = t
    total = torch.zeros_like(x)
    for i in range(jumps):
        b = r + (t - r) * (1 - (i + 1) / jumps)
        jump = expand(a - b, x) * average(denoiser, x, a.clamp(min=0), b.clamp(min=0), c)
        x = x - jump
        a = b
        total = total + jump
    return total


def guide_velocity(
    v: Tensor, omega: float, kappa: float, net: Denoiser, x: Tensor, t: Tensor, c: Condition, inside: Tensor
) -> Tensor:
    """omega v + (1 - omega - kappa) F(null) + kappa F(c) at (t, t): guidance omega / (1 - kappa) from F itself.

    omega and kappa are MeanFlow's. TwinFlow's enhancement has omega = 1 and kappa = its ratio. inside [B]: samples to
    which it applies; the others keep v. Call it without grad.
    """
    if omega == 1 and kappa == 0:
        return v
    null = average(CFG(net, 0.0), x, t, t, c)
    cond = average(net, x, t, t, c) if kappa else v
    own = omega * v + (1 - omega - kappa) * null + kappa * cond
    return torch.where(expand(inside, x).bool(), own, v)


class EndTimeEmbedding(nn.Module):
    """r [B] -> [B, dim], added to a network's time embedding: 0 at r = 0, and 0 for all r before training."""

    def __init__(self, dim: int, waves: int = 16) -> None:
        super().__init__()
        self.waves = waves
        self.linear_1 = nn.Linear(2 * waves, dim, bias=False)
        self.linear_2 = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.linear_2.weight)

    def forward(self, r: Tensor) -> Tensor:
        like = self.linear_1.weight
        waves = torch.logspace(0, 1.2, self.waves, dtype=like.dtype, device=like.device)  # 1 to 16: smooth in r
        phase = r.to(like)[:, None] * waves
        return self.linear_2(nnf.silu(self.linear_1(torch.cat([phase.sin(), 1 - phase.cos()], dim=1))))


@dataclass(frozen=True)
class EndTimeCall:
    """`call` for a network whose child `end` is added to the output of its submodule `where` if c has "end"."""

    call: Call
    where: str

    @property
    def feature(self) -> Feature:
        return getattr(self.call, "feature", first_output)

    def __call__(self, net: nn.Module, x: Tensor, t: Tensor, c: Condition) -> Tensor:
        if c is None or "end" not in c:
            return self.call(net, x, t, c)
        r = c["end"]
        rest = {k: v for k, v in c.items() if k != "end"}
        add = lambda module, args, out: out + net.end(r).to(out)  # type: ignore[operator]
        handle = net.get_submodule(self.where).register_forward_hook(add)
        try:
            return self.call(net, x, t, rest or None)
        finally:
            handle.remove()


@dataclass(frozen=True)
class FixedEndCall:
    """`call` with a fixed end time r."""

    call: Call
    r: float

    @property
    def feature(self) -> Feature:
        return getattr(self.call, "feature", first_output)

    def __call__(self, net: nn.Module, x: Tensor, t: Tensor, c: Condition) -> Tensor:
        return self.call(
            net, x, t, with_end_key(c, torch.full((len(x),), self.r, dtype=torch.float64, device=x.device))
        )


def with_end_time(denoiser: Denoiser, to: float) -> Denoiser:
    """The denoiser with the end time `to` (of its own path) in every call."""
    r = PATH.time(denoiser.path.ratio(torch.tensor([to], dtype=torch.float64)))
    return replace(denoiser, call=FixedEndCall(denoiser.call, float(r)))


def last_linear(embedding: nn.Module) -> nn.Linear:
    """The last linear layer of a time embedding."""
    *_, layer = (m for m in embedding.modules() if isinstance(m, nn.Linear))
    return layer


def time_embedding(net: nn.Module) -> str:
    """The name of the first TimestepEmbedding of a network. ValueError if it has none."""
    name = next((n for n, m in net.named_modules() if type(m).__name__ == "TimestepEmbedding"), None)
    if name is None:
        raise ValueError(
            f"this method's student has a second time, which is added to a TimestepEmbedding; {type(net).__name__} has "
            "none: choose another method"
        )
    return name


def add_end_time(denoiser: Denoiser) -> Denoiser:
    """The denoiser with the input "end": its network gains a trainable child `end`, which is 0 before training.

    It requires a TimestepEmbedding of diffusers in the network. The first one embeds the time.
    """
    net = denoiser.net
    where = time_embedding(denoiser.net)
    layer = last_linear(net.get_submodule(where))
    like = layer.weight
    net.end = EndTimeEmbedding(layer.out_features).to(like.device, torch.promote_types(like.dtype, torch.float32))
    return replace(denoiser, call=EndTimeCall(denoiser.call, where))


def remove_end_time(denoiser: Denoiser) -> Denoiser:
    """The denoiser without its second time: the output for calls without "end". Weights are shared."""
    if not isinstance(denoiser.call, EndTimeCall):
        return denoiser
    net = shallow_module_copy(denoiser.net)
    del net.end
    return replace(denoiser, net=net, call=denoiser.call.call)


@torch.no_grad()
def fold_end_times(denoiser: Denoiser, legs: Sequence[tuple[float, float]], x: Tensor, c: Condition) -> Denoiser:
    """An equivalent denoiser without the end time, for the pairs (t, end) in `legs` only.

    The smallest change of the time embedding's last layer that gives the embedding of t and its end at each of these t.
    Do not call it at another time. x [1, ...] and c are an example input.
    """
    assert isinstance(denoiser.call, EndTimeCall)
    plain = remove_end_time(denoiser)
    where = denoiser.call.where
    t, ends = torch.tensor(legs, dtype=torch.float64, device=x.device).T
    r = torch.where(ends > 0, PATH.time(denoiser.path.ratio(ends)), 0.0)
    layer = last_linear(plain.net.get_submodule(where))
    heard = []
    handle = layer.register_forward_pre_hook(lambda module, args: heard.append(args[0].double()))
    plain.features(x.expand(len(t), *x.shape[1:]), t, repeat_condition(c, len(t)), (where,))
    handle.remove()
    before = torch.cat([heard[0], torch.ones_like(heard[0][:, :1])], dim=1)
    change = torch.linalg.pinv(before) @ denoiser.net.end(r).double()  # type: ignore[operator]
    layer.weight = nn.Parameter((layer.weight + change[:-1].T).to(layer.weight))
    layer.bias = nn.Parameter((layer.bias + change[-1]).to(layer.bias))
    return plain
