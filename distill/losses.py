"""The pieces that losses are made of. A reduction is "mean" over all elements, or "sum" over elements / batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from distill.diffusion.schedule import Prediction

Reduction = Literal["mean", "sum"]


def reduce(elements: Tensor, reduction: Reduction) -> Tensor:
    """[B, ...] -> scalar: the mean, or the sum over everything divided by B."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum' (sum over elements / batch)")
    return elements.mean() if reduction == "mean" else elements.sum() / len(elements)


def sum_over_processes(numbers: Tensor) -> Tensor:
    """The sum over all processes, without gradient; every process must call it."""
    from accelerate.utils import reduce as over_processes

    return numbers if numbers.is_meta else over_processes(numbers.detach(), "sum")


def per_sample(elements: Tensor) -> Tensor:
    """Mean over everything but the batch, kept broadcastable: [B, ...] -> [B, 1, ...]."""
    return elements.flatten(1).mean(1).reshape(-1, *[1] * (elements.ndim - 1))


def gradient_surrogate(x: Tensor, g: Tensor) -> Tensor:
    """Elements [B, ...] whose sum has the gradient g to x, exactly; their value is g^2 / 2.

    The surrogate |x - sg(x - g)|^2 / 2 of score distillation without its rounding.
    """
    g = g.detach()
    return g * (x - x.detach()) + g**2 / 2


def normaliser(x: Tensor, real: Tensor, low: float = 1e-5) -> Tensor:
    """mean |x - real| of every sample [B, 1, ...], without gradient: the weight of DMD (eq. 8) and SiD is 1 over it."""
    return per_sample((x - real).abs()).clamp(min=low).detach()


def denoising(
    pred: Prediction,
    x0: Tensor,
    eps: Tensor,
    reduction: Reduction,
    space: Literal["network", "x0"] = "network",
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Squared error in the network's own space: eps-, v-, flow-matching, or EDM's weighted denoising loss.

    space "x0": of the clean sample instead, whatever the network predicts. weight: of each element.
    """
    error = pred.out - pred.target(x0, eps) if space == "network" else pred.x0 - x0
    return reduce(weight * pred.weight * error**2, reduction)


def huber(delta: Tensor, c: float = 1e-3) -> Tensor:
    """Pseudo-Huber elements sqrt(delta^2 + c^2) - c (LCM); c = 0 is |delta|."""
    return (delta**2 + c**2).sqrt() - c if c else delta.abs()  # the root has no derivative at 0


def adaptive(size: Tensor, p: float, floor: float) -> Tensor:
    """size / sg(size + floor)^p of the squared size [B] of every sample's error: 1 weighs all gradients alike, 0 none.

    MeanFlow: the sum of squares, p = 1, floor = .01. Barron's loss of alpha = 1 and c (TwinFlow): their mean, p = .5,
    floor = c^2. The value says little: log the size.
    """
    return size / (size.detach() + floor) ** p


def huber_norm(delta: Tensor, c: float = 0.0) -> Tensor:
    """Pseudo-Huber distance sqrt(|delta|^2 + c^2) - c of every sample's whole vector [B] (iCT); c = 0 is the norm.

    Not the elements' `huber`: c grows with the root of the number of elements, 0.00054 of it in iCT.
    """
    size = torch.linalg.vector_norm(delta.flatten(1), dim=1)  # its derivative at 0 is 0
    return (size**2 + c**2).sqrt() - c if c else size


def cauchy_norm(delta: Tensor, c: float) -> Tensor:
    """log(1 + |delta|^2 / (2 c^2)) of every sample's whole vector [B] (sLCT, arXiv 2502.01441); c > 0."""
    return torch.log1p(delta.flatten(1).square().sum(1) / (2 * c**2))


def gan_generator(fake: Tensor) -> Tensor:
    """Non-saturating loss softplus(-logit), mean."""
    return F.softplus(-fake).mean()


def gan_discriminator(fake: Tensor, real: Tensor) -> Tensor:
    """softplus(logit) on fakes + softplus(-logit) on reals, means."""
    return F.softplus(fake).mean() + F.softplus(-real).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-logit, mean: the student's side of the hinge loss."""
    return -fake.mean()


def hinge_discriminator(fake: Tensor, real: Tensor) -> Tensor:
    """relu(1 + logit) on fakes + relu(1 - logit) on reals, means (Lim & Ye 2017)."""
    return F.relu(1 + fake).mean() + F.relu(1 - real).mean()


@torch.no_grad()
def score_gap_logs(x: Tensor, real: Tensor, fake: Tensor, own: bool = True) -> dict[str, Tensor]:
    """Logs of two scores: score_gap = mean (real - fake)^2 and lag = mean (x - fake) (real - fake).

    x, real, fake [B, ...]: samples and both scores' x0 at x_t, or noise and both scores' eps. A fake score that has
    caught up with the student is E[x | x_t], and then the lag is 0 in expectation: x - E[x | x_t] has no correlation
    with a function of x_t (the identity of SiD, arXiv 2404.04057). lag / score_gap is the share of the way from fake to
    real that the student is ahead. own: the fake is guided here as in its own loss; without that there is no lag.
    """
    gap = real - fake
    return {"score_gap": gap.square().mean()} | ({"lag": ((x - fake) * gap).mean()} if own else {})


class _Forward(TorchFunctionMode):
    """What forward-mode differentiation asks of layers, in this thread alone.

    Linear layers and convolutions act on a tangent as on a value, less the bias: two products, torch makes three.
    Attention runs on the math kernel: flash and memory-efficient attention have no forward-mode rule.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func in (F.linear, F.conv1d, F.conv2d, F.conv3d) and not kwargs and len(args) > 1:
            x, weight, bias, *rest = (*args, None) if len(args) == 2 else args
            value, tangent = forward_ad.unpack_dual(x)
            if tangent is not None:
                with torch.no_grad():
                    slope = func(tangent, weight, None, *rest)
                return forward_ad.make_dual(func(value, weight, bias, *rest), slope)
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The math kernel of scaled_dot_product_attention, whose choice by `sdpa_kernel` would be that of all threads."""
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # as with the function itself
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    kernel = torch.ops.aten._scaled_dot_product_attention_math
    out, _ = kernel(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out


def jvp(
    f: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], graph: bool = False
) -> tuple[Tensor, Tensor]:
    """(f(primals), directional derivative along tangents) by forward-mode differentiation; weights have no tangents.

    graph: the value, not the derivative, can be differentiated backward; gradient checkpointing cannot be inside.
    """
    with torch.set_grad_enabled(graph), forward_ad.dual_level(), _Forward():
        out = f(*(forward_ad.make_dual(x, dx.to(x)) for x, dx in zip(primals, tangents, strict=True)))
        value, slope = forward_ad.unpack_dual(out)
    return value, torch.zeros_like(value) if slope is None else slope.detach()
