"""Negative prompts for students of a few steps, at inference: NASA and NAG in the cross-attention, without guidance.

    Z+ = softmax(Q K+^T) V+ of the prompt, Z- of the negative one, with the same Q, before the output projection
    NASA: Z = Z+ - alpha Z-                     Nguyen et al. 2024 (SNOOPI), arXiv 2412.02687
    NAG:  Z~ = phi Z+ - (phi - 1) Z-, of every token cut to |Z~|_1 <= tau |Z+|_1;  Z = a Z~ + (1 - a) Z+    2505.21179

    teacher = opened("runs/swiftbrush/pipeline")
    with negative(teacher, "blurry", NASA(0.2), pipe.unet):
        pipe("a red fox", num_inference_steps=1, guidance_scale=0)

It costs a second attention over the text. NASA shrinks what it does not turn, by about 1 - alpha: images grow grey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipelines import Teacher

Rule = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NASA:
    """Z+ - alpha Z-; alpha = 0 is no negative prompt."""

    alpha: float = 0.2  # .1 SD 1.5, .2 SD 2.1, .5 PixArt-alpha (paper)

    def __call__(self, z: Tensor, z_neg: Tensor) -> Tensor:
        return z - self.alpha * z_neg


@dataclass(frozen=True)
class NAG:
    """Extrapolation, normalised token by token and blended; blend = 0 is no negative prompt."""

    scale: float = 5.0  # phi
    tau: float = 2.5  # of the L1 norm (paper)
    blend: float = 0.25  # a (paper)

    def __call__(self, z: Tensor, z_neg: Tensor) -> Tensor:
        far = self.scale * z - (self.scale - 1) * z_neg
        most = self.tau * z.abs().sum(-1, keepdim=True)
        far = far * (most / far.abs().sum(-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        return self.blend * far + (1 - self.blend) * z


@contextmanager
def negative(teacher: Teacher, text: str, rule: Rule, net: nn.Module | None = None) -> Iterator[None]:
    """Within, every cross-attention of `net` also turns away from `text`.

    net: of the teacher's family, a student's say; None: the teacher's own. ValueError where it has no cross-attention:
    networks whose text and image tokens are in one sequence (SD 3, FLUX, Qwen-Image).
    """
    net = teacher.denoiser.net if net is None else net
    layers = [m for name, m in net.named_modules() if name.endswith("attn2") and hasattr(m, "to_out")]
    if not layers:
        raise ValueError(f"{type(net).__name__} has no cross-attention that a negative prompt could turn from")
    words = said(teacher, text, net, layers[0])
    before = [layer.processor for layer in layers]
    try:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = Turned(processor, words, rule)
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = processor


class Turned:
    """An attention processor that runs another one with the negative words, too."""

    def __init__(self, processor: Any, words: Tensor, rule: Rule) -> None:
        self.processor, self.words, self.rule = processor, words, rule

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **options: Any
    ) -> Any:
        seen: list[Tensor] = []
        words = self.words.to(hidden_states).expand(len(hidden_states), -1, -1)
        bare = options | ({"attention_mask": None} if "attention_mask" in options else {})
        with before(attn.to_out[0], seen.append):
            self.processor(attn, hidden_states, words, *(None for _ in args[:1]), *args[1:], **bare)
        with before(attn.to_out[0], lambda z: self.rule(z, seen[0])):
            return self.processor(attn, hidden_states, encoder_hidden_states, *args, **options)


@contextmanager
def before(layer: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """`see` is shown what the layer is given, and may give it something else."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        other = see(args[0])
        return None if other is None else (other, *args[1:])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Heard(Exception):
    """Raised where the text has reached the first cross-attention: the rest of the pass is not needed."""


@torch.no_grad()
def said(teacher: Teacher, text: str, net: nn.Module, layer: nn.Module) -> Tensor:
    """The words [1, L, D] of a text as the cross-attention is given them, projected by the network, without padding."""
    found: list[tuple[Tensor, Tensor | None]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        places = dict(zip(("hidden_states", "encoder_hidden_states", "attention_mask"), args, strict=False)) | options
        found.append((places["encoder_hidden_states"], places.get("attention_mask")))
        raise _Heard

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    weight = next(net.parameters())
    x, t = (
        torch.zeros(1, *teacher.shape, device=weight.device),
        torch.ones(1, dtype=torch.float64, device=weight.device),
    )
    c = {key: value.to(weight.device) for key, value in (teacher.encode([text]) or {}).items()}
    try:
        teacher.denoiser.call(net, x.to(weight.dtype), teacher.denoiser.schedule.native(t).to(weight.dtype), c)
    except _Heard:
        pass
    finally:
        handle.remove()
    words, mask = found[0]
    return words if mask is None else words[:, mask.reshape(-1)[: words.shape[1]] > -1]
