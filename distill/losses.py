"""Parts of losses. A reduction is "mean" over all elements, or "sum": the sum of all elements divided by B."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from distill.diffusion.schedule import Prediction

Reduction = Literal["mean", "sum"]


def reduce(elements: Tensor, reduction: Reduction) -> Tensor:
    """[B, ...] -> scalar: the mean over all elements, or their sum divided by B."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum' (sum over elements / batch)")
    return elements.mean() if reduction == "mean" else elements.sum() / len(elements)


def sum_over_processes(numbers: Tensor) -> Tensor:
    """The sum over all processes, without gradient. Collective: every process must call it."""
    from accelerate.utils import reduce as over_processes

    return numbers if numbers.is_meta else over_processes(numbers.detach(), "sum")


def per_sample(elements: Tensor) -> Tensor:
    """[B, ...] -> [B, 1, ...]: the mean over all dimensions but the batch, in a shape that broadcasts."""
    return elements.flatten(1).mean(1).reshape(-1, *[1] * (elements.ndim - 1))


def gradient_surrogate(x: Tensor, g: Tensor) -> Tensor:
    """Elements [B, ...] whose sum has exactly the gradient g with respect to x. Their value is g^2 / 2.

    Equivalent to |x - sg(x - g)|^2 / 2 of score distillation, but without its rounding error.
    """
    g = g.detach()
    return g * (x - x.detach()) + g**2 / 2


def normaliser(x: Tensor, real: Tensor, low: float = 1e-5) -> Tensor:
    """mean |x - real| of each sample [B, 1, ...], without gradient. DMD (eq. 8) and SiD weight by 1 over it."""
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

    space "x0": squared error of the clean sample, whatever the network predicts. weight: factor of each element.
    """
    error = pred.out - pred.target(x0, eps) if space == "network" else pred.x0 - x0
    return reduce(weight * pred.weight * error**2, reduction)


def huber(delta: Tensor, c: float = 1e-3) -> Tensor:
    """Pseudo-Huber loss of each element, sqrt(delta^2 + c^2) - c (LCM); c = 0 gives |delta|."""
    return (delta**2 + c**2).sqrt() - c if c else delta.abs()  # the root has no derivative at 0


def adaptive(size: Tensor, p: float, floor: float) -> Tensor:
    """size / sg(size + floor)^p for the squared error size [B] of each sample.

    p = 1 gives gradients of all samples the same weight; p = 0 leaves them as they are.
    MeanFlow: size is the sum of squares, p = 1, floor = .01. Barron's loss of alpha = 1 and c (TwinFlow): size is their
    mean, p = .5, floor = c^2. The value carries little information: log the size.
    """
    return size / (size.detach() + floor) ** p


def huber_norm(delta: Tensor, c: float = 0.0) -> Tensor:
    """Pseudo-Huber distance sqrt(|delta|^2 + c^2) - c [B] of each sample's whole vector (iCT); c = 0 gives the norm.

    `huber` works on elements instead. Here c grows with the root of the number of elements; iCT: 0.00054 of that root.
    """
    size = torch.linalg.vector_norm(delta.flatten(1), dim=1)  # PyTorch defines its derivative at 0 as 0
    return (size**2 + c**2).sqrt() - c if c else size


def cauchy_norm(delta: Tensor, c: float) -> Tensor:
    """log(1 + |delta|^2 / (2 c^2)) [B] of each sample's whole vector (sLCT, arXiv 2502.01441); c > 0."""
    return torch.log1p(delta.flatten(1).square().sum(1) / (2 * c**2))


def gan_generator(fake: Tensor) -> Tensor:
    """Non-saturating generator loss: the mean of softplus(-logit)."""
    return F.softplus(-fake).mean()


def gan_discriminator(fake: Tensor, real: Tensor) -> Tensor:
    """The mean of softplus(logit) on fakes + the mean of softplus(-logit) on reals."""
    return F.softplus(fake).mean() + F.softplus(-real).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """Generator side of the hinge loss: the mean of -logit."""
    return -fake.mean()


def hinge_discriminator(fake: Tensor, real: Tensor) -> Tensor:
    """The mean of relu(1 + logit) on fakes + the mean of relu(1 - logit) on reals (Lim & Ye 2017)."""
    return F.relu(1 + fake).mean() + F.relu(1 - real).mean()


def preference_kl(rewards: list[Tensor], proxies: list[Tensor], tau: float) -> tuple[Tensor, Tensor]:
    """(KL( P || P_L ), fraction of preferences with the right sign) of rewards [B] and their proxies [B] of each image.

    P = sigmoid((R_a - R_b) / tau) is the preference between two images, P_L that of the proxies. The KL is a sum over
    the pairs of images and a mean over samples. The gradient flows to the proxies.
    """
    total = proxies[0].new_zeros(())
    right = []
    for a, b in combinations(range(len(proxies)), 2):
        logit = (proxies[a] - proxies[b]) / tau
        wanted = (rewards[a] / tau - rewards[b] / tau).to(logit)
        total = total + F.binary_cross_entropy_with_logits(logit, wanted.sigmoid())
        total = total - F.binary_cross_entropy_with_logits(wanted, wanted.sigmoid())
        right.append(((logit > 0) == (wanted > 0)).float().mean())
    return total, torch.stack(right).mean()


@torch.no_grad()
def score_gap_logs(x: Tensor, real: Tensor, fake: Tensor, own: bool = True) -> dict[str, Tensor]:
    """Logs of two scores: score_gap = mean (real - fake)^2 and lag = mean (x - fake) (real - fake).

    x, real, fake [B, ...]: samples and both scores' x0 at x_t, or noise and both scores' eps.
    A fake score that fits the student perfectly is E[x | x_t]. Then lag is 0 in expectation: x - E[x | x_t] has no
    correlation with a function of x_t (the identity of SiD, arXiv 2404.04057). lag / score_gap is the student's lead
    over the fake score, as a fraction of the distance from fake to real.
    own: the fake score has the same guidance here as in its own loss; without it lag is not logged.
    """
    gap = real - fake
    return {"score_gap": gap.square().mean()} | ({"lag": ((x - fake) * gap).mean()} if own else {})


class _Forward(TorchFunctionMode):
    """Replaces layers during forward-mode differentiation, in this thread only.

    A linear layer or convolution acts on a tangent as on a value, without the bias: two products, torch makes three.
    Attention runs on the math kernel, because flash and memory-efficient attention have no forward-mode rule.
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
    """scaled_dot_product_attention on the math kernel. `sdpa_kernel` would select that kernel for all threads."""
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # as in the original
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
    """(f(primals), directional derivative along tangents) by forward-mode differentiation. Weights have no tangents.

    graph: keep the graph of the value for a backward pass; the derivative has none. f must not use gradient
    checkpointing.
    """
    with torch.set_grad_enabled(graph), forward_ad.dual_level(), _Forward():
        out = f(*(forward_ad.make_dual(x, dx.to(x)) for x, dx in zip(primals, tangents, strict=True)))
        value, slope = forward_ad.unpack_dual(out)
    return value, torch.zeros_like(value) if slope is None else slope.detach()
