"""Negative prompts in the cross-attention: they act without guidance and its second forward pass.

A prompt has a fixed number of tokens. The tokens of the negative prompt follow them in the condition
(`with_negative_prompt`), through projections, masks and recomputed blocks. Without them the network's output is
unchanged bit for bit. In every cross-attention, a processor around the network's own computes:

    z  = softmax(Q K^T) V of the prompt,   z- of the negative prompt, with the same Q, before the output projection
    NASA:  z - alpha z-                                                  Nguyen et al. 2024 (SNOOPI), arXiv 2412.02687
    SUN:   z - alpha- |z| z- / |z-| - beta- + alpha+ |z| z+ / |z+| + beta+            Chai et al. 2023, 2312.08887

SUN's z- and z+ have their own keys and values (`Offset`): an adapter, which is all that is trained. alpha and beta are
one number per channel. |.| is the 2-norm over all tokens and channels of one sample. The public code takes the norm
over the whole batch: for one sample it is the same, for several an image would depend on the others in its batch.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition
from distill.modules import promote_trainable_to_float32, shallow_module_copy
from distill.random import Draw

TEXT = ("prompt_embeds", "mask")  # keys of a condition whose second axis is tokens
KEPT = nn.Identity(), nn.Identity()  # an output projection and a dropout that do nothing
Rule = Callable[[Tensor, Tensor], Tensor]
Text = tuple[Tensor, Tensor | None]  # tokens [B, L, D] and their mask, the inputs of a cross-attention
Attend = Callable[..., Tensor]  # (text, to_k=, to_v=) -> the attention's z [B, N, D]
Processor = Callable[..., Tensor]  # (attention, hidden states, tokens, mask, ...) -> the layer's output [B, N, D]
N = TypeVar("N", bound=nn.Module)


class Attention(nn.Module):
    """The type of diffusers' cross-attentions here, not a base class of theirs. negative: the adapter of `adapt`."""

    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList
    processor: Processor
    negative: Offset


@dataclass(frozen=True)
class NASA:
    """Z+ - alpha Z-. alpha = 0 ignores the negative prompt."""

    alpha: float = 0.2  # .1 SD 1.5, .2 SD 2.1, .5 PixArt-alpha (paper)

    def __call__(self, z: Tensor, z_neg: Tensor) -> Tensor:
        return z - self.alpha * z_neg


def with_negative_prompt(c: Condition, other: Condition) -> Condition:
    """The condition c with the tokens of `other` (batch B or 1) as its negative prompt."""
    assert c is not None and other is not None
    joined = {k: torch.cat([c[k], other[k].to(c[k]).expand_as(c[k])], dim=1) for k in TEXT if k in c}
    return c | joined


def shuffled_conditions(c: Condition, draw: Draw) -> dict[str, Tensor]:
    """For each sample the condition of another one, uniformly. ValueError for a micro-batch of one sample."""
    assert c is not None
    B = len(draw.samples)
    if B < 2:
        raise ValueError("negative prompts are those of a micro-batch's other samples, and it has one: make it larger")
    i = (torch.arange(B, device=draw.device) + 1 + draw.integers("another", B - 1)) % B
    return {key: value[i] for key, value in c.items()}


class NegativePromptProcessor(ABC):
    """An attention processor that calls another processor and combines its results for the prompt and the negative
    prompt.

    length: number of tokens of the prompt; the negative prompt's tokens follow. words [1, L, D]: a fixed negative
    prompt instead.
    """

    def __init__(self, processor: Processor, length: int = 0, words: Tensor | None = None) -> None:
        self.processor = processor
        self.length = length
        self.words = words

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None, *a: object, **options: object,
    ) -> Tensor:  # fmt: skip
        def run(attn: Attention | AttentionView, text: Text) -> Tensor:
            return self.processor(attn, hidden_states, *text, *a, **options)

        def attend(text: Text, **own: object) -> Tensor:
            return run(AttentionView(attn, to_out=KEPT, **own), text)

        text, other = self.split_prompt((encoder_hidden_states, attention_mask), hidden_states)
        if other is None:
            return run(attn, text)
        with replace_input(attn.to_out[0], lambda z: self.join(attn, z, text, other, attend)):
            return run(attn, text)

    def split_prompt(self, text: Text, like: Tensor) -> tuple[Text, Text | None]:
        """(prompt, negative prompt); None if there is no negative prompt."""
        if self.words is not None:
            return text, (self.words.to(like).expand(len(like), -1, -1), None)
        words, mask = text
        n = self.length
        if words.shape[1] <= n:
            return text, None
        first, second = (None, None) if mask is None else (mask[..., :n], mask[..., n:])
        return (words[:, :n], first), (words[:, n:], second)

    @abstractmethod
    def join(self, attn: Attention, z: Tensor, text: Text, other: Text, attend: Attend) -> Tensor:
        """The input of the output projection. z is the attention's result for the prompt."""


class RuleProcessor(NegativePromptProcessor):
    """Combines by a rule, with the layer's own keys and values."""

    def __init__(self, processor: Processor, rule: Rule, length: int = 0, words: Tensor | None = None) -> None:
        super().__init__(processor, length, words)
        self.rule = rule

    def join(self, attn: Attention, z: Tensor, text: Text, other: Text, attend: Attend) -> Tensor:
        return self.rule(z, attend(other))


class AdapterProcessor(NegativePromptProcessor):
    """Combines by the layer's child "negative", an `Offset`."""

    def join(self, attn: Attention, z: Tensor, text: Text, other: Text, attend: Attend) -> Tensor:
        return z - attn.negative.minus(z, other, attend) + attn.negative.plus(z, text, attend)


class AttentionView:
    """An attention in which some submodules are replaced."""

    def __init__(self, attn: Attention, **parts: object) -> None:
        self.__dict__ |= {"attn": attn, **parts}

    def __getattr__(self, name: str) -> object:
        return getattr(self.attn, name)


@contextmanager
def replace_input(layer: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see` with the input of the layer. If it returns a tensor, that replaces the input."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        other = see(args[0])
        return None if other is None else (other, *args[1:])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Branch(nn.Module):
    """alpha |z| u / |u| + beta of an attention's u [B, N, D], computed with its own keys and values; 0 before training.

    The public code starts at alpha = 1, where u replaces z. At 0 the network starts unchanged, as with a LoRA.
    """

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.to_k = copy.deepcopy(attn.to_k)
        self.to_v = copy.deepcopy(attn.to_v)
        like = attn.to_out[0].get_parameter("weight")
        self.alpha, self.beta = (nn.Parameter(like.new_zeros(like.shape[1])) for _ in range(2))

    def forward(self, z: Tensor, text: Text, attend: Attend) -> Tensor:
        u = attend(text, to_k=self.to_k, to_v=self.to_v)
        gain = size(z) / size(u).clamp(min=1e-12)
        return (self.alpha * (gain * u) + self.beta).to(z)


def size(z: Tensor) -> Tensor:
    """The norm of each sample [B, 1, 1], independent of the rest of the batch."""
    return torch.linalg.vector_norm(z, dim=(1, 2), keepdim=True)


class Offset(nn.Module):
    """The adapter of SUN in one layer."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.minus = Branch(attn)
        self.plus = Branch(attn)


def layers(net: nn.Module) -> dict[str, Attention]:
    """The cross-attentions of a network by name. ValueError if it has none.

    SD, SDXL, PixArt, SANA and Wan have them. SD 3, FLUX and Qwen-Image have text and image in one sequence.
    """
    found = {name: m for name, m in net.named_modules() if name.endswith("attn2") and hasattr(m, "to_out")}
    found = {name: m for name, m in found.items() if getattr(m, "is_cross_attention", True)}  # SD 3.5: some are not
    if not found:
        raise ValueError(f"{type(net).__name__} has no cross-attention that could hear a negative prompt")
    return cast(dict[str, Attention], found)


def install_negative_rule(net: nn.Module, rule: Rule, length: int) -> None:
    """Make the network's cross-attentions apply the rule to a negative prompt, in place and without new weights.

    The rule stays installed, because blocks are recomputed in the backward pass.
    """
    for layer in layers(net).values():
        if not isinstance(layer.processor, RuleProcessor):
            layer.processor = RuleProcessor(layer.processor, rule, length)
        layer.processor.rule = rule


def adapt(net: N, length: int) -> N:
    """Give every cross-attention of the network SUN's adapter, in place. The output does not change yet.

    length: number of tokens of a prompt; the negative prompt's tokens follow.
    """
    for layer in layers(net).values():
        layer.negative = Offset(layer)
        layer.processor = AdapterProcessor(layer.processor, length)
    return net


def strip(net: N) -> N:
    """Remove the adapters, if there are any, in place."""
    for layer in layers(net).values() if adapters(net) else ():
        del layer.negative
        assert isinstance(layer.processor, AdapterProcessor)
        layer.processor = layer.processor.processor
    return net


def build_adapter_role(backbone: nn.Module, length: int) -> nn.Module:
    """A role: the shared frozen backbone with trainable adapters on it (`adapt`)."""
    net = adapt(shallow_module_copy(backbone.requires_grad_(False)), length)
    for layer in layers(net).values():
        layer.negative.requires_grad_(True)
    return promote_trainable_to_float32(net)


def adapters(net: nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapters by name; empty for a network without adapters."""
    return {name: p.detach() for name, p in net.named_parameters() if ".negative." in f".{name}"}
