"""PAG: guidance away from the network without self-attention. Ahn et al. 2024, arXiv 2403.17377.

    eps~ = eps + s (eps - eps^),   eps^: chosen self-attention maps are the identity, softmax(Q K^T) V -> V
    with guidance w              null + w (cond - null) + s (cond - cond^)

For the teacher of any recipe: --pag_scale 3 --pag_layers mid_block (SD, SDXL; transformer_blocks.0 for SANA). It needs
no null condition, so it also works for a teacher without one. As in diffusers' PAG pipelines, if text and image are one
sequence (SD 3), an image token attends to itself and to the text. eps^ is a separate network around the same tensors,
so that no switch can have the wrong value in a recomputed block, a student or a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.guidance import WorseModelGuided
from distill.modules import shallow_module_copy
from distill.roles import Nets

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention, AttnProcessor

ALONE = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SanaLinearAttnProcessor2_0")
JOINT = ("JointAttnProcessor2_0",)


def attach_pag(nets: Nets, s: float, layers: tuple[str, ...]) -> None:
    """Add PAG to the teacher of a run, and to its past checkpoints. s = 0 changes nothing."""
    if s:
        nets.teacher = with_pag(nets.teacher, s, layers)
        if nets.past is not None:
            nets.past.denoiser = with_pag(nets.past.denoiser, s, layers)


def with_pag(denoiser: Denoiser, s: float, layers: tuple[str, ...]) -> WorseModelGuided:
    """A denoiser with PAG. layers: modules of its network in which all self-attention is perturbed."""
    return WorseModelGuided(**vars(denoiser), worse=without_self_attention(denoiser.net, layers), s=s)


def without_self_attention(net: nn.Module, layers: tuple[str, ...]) -> nn.Module:
    """A network around the tensors of `net` whose self-attention in `layers` is the identity.

    ValueError if one of them has no self-attention, or an unsupported kind (rotary and video networks).
    """
    made = shallow_module_copy(net)
    attentions = {name: module for name, module in made.named_modules() if _perturbable(module)}
    if not attentions:
        raise ValueError(
            f"PAG perturbs self-attention, and {type(net).__name__} has none of a kind that can be: "
            "UNets with attention, PixArt, SANA and SD 3 have. Leave out pag_scale"
        )
    for layer in layers or ("",):
        inside = [m for name, m in attentions.items() if layer and f"{name}.".startswith(f"{layer}.")]
        if not inside:
            blocks = sorted({".".join(name.split(".")[:2]) for name in attentions})
            raise ValueError(f"pag_layers: there is no self-attention in {layer!r}; it is in {', '.join(blocks)}")
        for module in inside:
            joint = getattr(module, "add_q_proj", None) is not None
            module.processor = Joint(module.processor) if joint else Identity()
    return made


def _perturbable(module: nn.Module) -> bool:
    """Whether a module is self-attention of image tokens, possibly jointly with text."""
    name = type(getattr(module, "processor", None)).__name__
    return name in (*ALONE, *JOINT) and not getattr(module, "is_cross_attention", True)


class Identity:
    """A processor of diffusers' Attention in which every token attends only to itself, [B, N, C] or [B, C, H, W]."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        x = x if attn.group_norm is None else attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        x = attn.to_out[1](attn.to_out[0](attn.to_v(x)))
        x = x.transpose(1, 2).reshape(hidden_states.shape) if hidden_states.ndim == 4 else x
        return (x + hidden_states if attn.residual_connection else x) / attn.rescale_output_factor


class Joint:
    """A processor of image and text in one sequence: image tokens attend to themselves and text, text to all."""

    def __init__(self, processor: AttnProcessor) -> None:
        self.processor = processor

    def __call__(
        self, attn: Attention, hidden_states: Tensor, *args: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        with SelfAttentionMask(hidden_states.shape[1]):
            return self.processor(attn, hidden_states, *args, **options)


class SelfAttentionMask(TorchFunctionMode):
    """In this context, none of the first n tokens attends to another of them. Modes apply to one thread."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Tensor, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            mask = query.new_zeros(query.shape[-2], key.shape[-2])
            mask[: self.n, : self.n] = float("-inf")
            kwargs = {**kwargs, "attn_mask": mask.fill_diagonal_(0)}
        return func(*args, **kwargs)
