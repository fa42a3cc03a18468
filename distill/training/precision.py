"""Options of the networks that save memory or time: precision, recomputation, attention kernels.

Each role has its own module tree (lora.py). A recomputed block is a module of that tree, so it recomputes its role.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from distill.networks.negative_attention import NegativePromptProcessor
from distill.roles import SMALL, Nets

if TYPE_CHECKING:
    from accelerate import Accelerator

TOLERANCE = 0.1  # largest relative difference of two attention kernels, in half precision


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The precision of a run, without a cache of casts: a weight cast under no_grad keeps no graph (torch before
    2.10)."""
    from accelerate.utils import AutocastKwargs

    if accelerator.mixed_precision == "no":
        return nullcontext()
    return accelerator.autocast(AutocastKwargs(cache_enabled=False))


def recompute(nets: Nets) -> None:
    """Gradient checkpointing in the student, the fake score and the teacher (SiD differentiates through all three).

    ValueError for a network without enable_gradient_checkpointing(), which networks of diffusers have.
    """
    for role, net in {**_denoisers(nets), **nets.frozen()}.items():
        if not hasattr(net, "enable_gradient_checkpointing"):
            raise ValueError(
                f"gradient_checkpointing: the {role}'s network, a {type(net).__name__}, has no method "
                "enable_gradient_checkpointing(); networks of diffusers do. Leave gradient_checkpointing off"
            )
        net.enable_gradient_checkpointing()


def deterministic() -> None:
    """Same bits on every run, on a GPU too. torch raises an error if it has no such kernel. Call it before any CUDA
    call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def attend(nets: Nets, backend: str, c: Condition = None) -> None:
    """Set the attention kernel of all roles. `backend` is a name of diffusers' set_attention_backend: native, flash,
    ...

    c: an example condition of batch 1. A broken kernel fails only when it is called, and an inference-only kernel only
    gives no gradient. So the student is run on a sample before and after. ValueError if the kernel is not available,
    fails, or gives a wrong output or gradient.
    """
    before = _attention(nets.student.denoiser, nets.shape, c)
    for net in _denoisers(nets).values():
        _set(net, backend)
    try:
        after = _attention(nets.student.denoiser, nets.shape, c)
    except Exception as error:  # a kernel may raise any error
        raise ValueError(f"attention {backend!r} was set but fails: {error}; choose another, or None") from error
    for what, old, new in zip(("output", "gradient"), before, after, strict=True):
        gap = float((new - old).norm() / old.norm().clamp(min=1e-20))
        if not gap <= TOLERANCE:
            raise ValueError(f"attention {backend!r} gives a wrong {what}: {gap:.2g} off, allowed {TOLERANCE}")


def _denoisers(nets: Nets) -> dict[str, Any]:
    """The denoisers by role, without heads and learned weights."""
    return {role: net for role, net in {"teacher": nets.teacher.net, **nets.modules()}.items() if role not in SMALL}


def _set(net: Any, backend: str) -> None:
    """Some families run all attention through one dispatcher. Others, for example UNets, support only torch's and
    xformers'."""
    processors = [getattr(module, "processor", None) for module in net.modules()]
    if backend == "xformers" and any(isinstance(processor, NegativePromptProcessor) for processor in processors):
        raise ValueError(
            "xformers replaces the processors of the adapter for negative prompts: choose another --attention"
        )
    dispatched = any(hasattr(processor, "_attention_backend") for processor in processors)
    try:
        if dispatched and hasattr(net, "set_attention_backend"):
            net.set_attention_backend(backend)
        elif backend == "xformers" and hasattr(net, "enable_xformers_memory_efficient_attention"):
            net.enable_xformers_memory_efficient_attention()
        elif backend != "native":
            raise ValueError(f"a {type(net).__name__} has native and, in diffusers, xformers")
    except Exception as error:  # a missing or old package, or an unknown name
        raise ValueError(f"attention {backend!r} is not to be had: {error}") from error


def reset_attention(net: Any) -> None:
    """Set torch's own attention again, which supports every precision on every device."""
    processors = [getattr(module, "processor", None) for module in net.modules()]
    if any(getattr(processor, "_attention_backend", None) is not None for processor in processors):
        net.set_attention_backend("native")  # it is also the default for networks that the process loads later
    if any("XFormers" in type(processor).__name__ for processor in processors):
        net.disable_xformers_memory_efficient_attention()


def _attention(denoiser: Denoiser, shape: tuple[int, ...], c: Condition) -> tuple[Tensor, Tensor]:
    """The output for a sample in the middle of the schedule, and the gradient of its square for a weight of the
    attention."""
    net = denoiser.net
    layers: list[nn.Module] = [module for module in net.modules() if hasattr(module, "processor")] or [net]
    weight = next(layers[0].parameters())
    x = torch.linspace(-1, 1, torch.Size(shape).numel(), device=weight.device).reshape(1, *shape)
    asked = weight.requires_grad
    weight.requires_grad_(True)
    out = denoiser(x, torch.full((1,), 0.5, dtype=torch.float64, device=x.device), c).out.float()
    (gradient,) = torch.autograd.grad(out.square().sum(), weight, allow_unused=True)
    weight.requires_grad_(asked)
    return out.detach(), (torch.zeros_like(weight) if gradient is None else gradient).float()


def adam8bit() -> Any:
    """The class AdamW8bit of bitsandbytes. ValueError, with the command to install it, if it is missing."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optimizer adamw8bit needs bitsandbytes ({error}): pip install bitsandbytes, or take adamw"
        ) from None
    return AdamW8bit
