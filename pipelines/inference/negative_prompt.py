"""Negative prompts without guidance, in the cross-attention: NASA and NAG for any student, SUN's trained adapter.

    Z+ = softmax(Q K+^T) V+ of the prompt, Z- of the negative one, with the same Q, before the output projection
    NASA: Z = Z+ - alpha Z-                     Nguyen et al. 2024 (SNOOPI), arXiv 2412.02687
    NAG:  Z~ = phi Z+ - (phi - 1) Z-, of every token cut to |Z~| <= tau |Z+|;  Z = a Z~ + (1 - a) Z+        2505.21179

    from distill.networks.negative_attention import NASA

    teacher = pipelines.load("runs/swiftbrush/pipeline")
    with apply_negative_prompt(teacher, "blurry", NASA(0.2), pipe.unet):
        pipe("a red fox", num_inference_steps=1, guidance_scale=0)

It costs a second attention over the text. NASA shrinks what it does not turn by about 1 - alpha, which makes images
grey. SUN's adapter (distill/methods/sun.py) is a file that `install` adds to a plain pipeline of diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.modules import meta_copy
from distill.networks.negative_attention import (
    NegativePromptProcessor,
    Rule,
    RuleProcessor,
    adapt,
    adapters,
    layers,
    strip,
)
from pipelines.components import Pipeline

if TYPE_CHECKING:
    from pipelines.teacher import Teacher


FILE = "negative.safetensors"  # SUN's adapter of an exported student
LIMIT = (
    "Plain diffusers runs the base without its adapter and without guidance. "
    f"`pipelines.inference.negative_prompt.install(pipe, file)` of distill-one-step adds the adapter {FILE}: install "
    "it before the call. Then the call's negative prompt works; its default is the empty prompt."
)


@dataclass(frozen=True)
class NAG:
    """Extrapolation, normalised per token and blended; blend = 0 ignores the negative prompt."""

    scale: float = 5.0  # phi
    tau: float = 2.5  # limit of the norm of Z~, in norms of Z+ (paper)
    blend: float = 0.25  # a (paper)
    norm: Literal[1, 2] = 1  # 1: paper, authors' processors of SDXL, SD 3.5 and Wan; 2: their processor of FLUX

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise ValueError(f"norm is {self.norm!r}; it must be 1 (paper) or 2 (the authors' FLUX code)")

    def __call__(self, z: Tensor, z_neg: Tensor) -> Tensor:
        far = self.scale * z - (self.scale - 1) * z_neg
        size, most = (torch.linalg.vector_norm(one, self.norm, dim=-1, keepdim=True) for one in (far, z))
        far = far * (self.tau * most / size.clamp(min=1e-12)).clamp(max=1)
        return self.blend * far + (1 - self.blend) * z


@contextmanager
def apply_negative_prompt(teacher: Teacher, text: str, rule: Rule, net: nn.Module | None = None) -> Iterator[None]:
    """In this context, every cross-attention of `net` also moves away from `text`.

    net: a network of the teacher's family, for example a student's; None: the teacher's own. ValueError if it has no
    cross-attention, because text and image tokens are in one sequence (SD 3, FLUX, Qwen-Image).
    """
    net = teacher.denoiser.net if net is None else net
    found = [*layers(net).values()]
    words = layer_condition(teacher, text, net, found[0])
    before = [layer.processor for layer in found]
    try:
        for layer, processor in zip(found, before, strict=True):
            layer.processor = RuleProcessor(processor, rule, words=words)
        yield
    finally:
        for layer, processor in zip(found, before, strict=True):
            layer.processor = processor


def write(net: nn.Module, file: Path) -> None:
    """Write SUN's adapters of a network in float32, with the number of tokens of a prompt."""
    processors = [layer.processor for layer in layers(net).values()]
    (length,) = {processor.length for processor in processors if isinstance(processor, NegativePromptProcessor)}
    save_file({name: t.float().contiguous() for name, t in adapters(net).items()}, file, {"length": f"{length}"})


@torch.no_grad()
def install(pipe: Pipeline, file: str | Path) -> Pipeline:
    """Add the adapters of `file` to the pipeline's network, so that it uses the negative prompt without guidance.

        install(pipe, "runs/sun/pipeline/negative.safetensors")
        pipe("a red fox", negative_prompt="blurry", guidance_scale=0, num_inference_steps=4)

    pipe: any pipeline of diffusers whose network has the base's class and sizes, for example a fine-tuned one. The
    default negative prompt is empty. With guidance the pipeline behaves as before. ValueError if the file does not fit.
    """
    net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    plain = type(pipe).encode_prompt
    signature = inspect.signature(plain)
    with safe_open(file, "pt") as stored:
        length = int((stored.metadata() or {}).get("length", 0))
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    fits = {name: t.shape for name, t in adapters(adapt(strip(meta_copy(net)), length)).items()}
    if not length or fits != {name: t.shape for name, t in tensors.items()}:
        raise ValueError(f"{file} is not an adapter for negative prompts of this {type(net).__name__}")
    if "do_classifier_free_guidance" not in signature.parameters:
        raise ValueError(f"a {type(pipe).__name__} has no negative prompts")
    for name, p in adapters(adapt(strip(net), length)).items():
        p.copy_(tensors[name])

    def encode_prompt(*args: object, **options: object) -> tuple[Tensor | None, ...]:
        given = signature.bind(pipe, *args, **options)
        given.apply_defaults()
        guided = given.arguments["do_classifier_free_guidance"]
        given.arguments["do_classifier_free_guidance"] = True
        made = plain(*given.args, **given.kwargs)
        if guided:
            return made
        first, second, *rest = made
        if second.ndim == 3:  # tokens of both prompts; ndim 2: SDXL's pooled embeddings
            return torch.cat([first, second], dim=1), None, *rest
        words, mask = rest  # tokens and masks of both prompts: PixArt, SANA
        return torch.cat([first, words], dim=1), torch.cat([second, mask], dim=1), None, None

    pipe.encode_prompt = encode_prompt
    return pipe


class _LayerReached(Exception):
    """Raised at the first cross-attention to stop the forward pass."""


@torch.no_grad()
def layer_condition(teacher: Teacher, text: str, net: nn.Module, layer: nn.Module) -> Tensor:
    """The tokens [1, L, D] of a text at the input of the cross-attention: projected by the network, without padding."""
    found: list[tuple[Tensor, Tensor | None]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
        places = dict(zip(("hidden_states", "encoder_hidden_states", "attention_mask"), args, strict=False)) | options
        found.append((places["encoder_hidden_states"], places.get("attention_mask")))
        raise _LayerReached

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    weight = next(net.parameters())
    x = torch.zeros(1, *teacher.shape, device=weight.device)
    t = torch.ones(1, dtype=torch.float64, device=weight.device)
    c = {key: value.to(weight.device) for key, value in (teacher.encode([text]) or {}).items()}
    try:
        teacher.denoiser.call(net, x.to(weight.dtype), teacher.denoiser.schedule.native(t).to(weight.dtype), c)
    except _LayerReached:
        pass
    finally:
        handle.remove()
    words, mask = found[0]
    return words if mask is None else words[:, mask.reshape(-1)[: words.shape[1]] > -1]
