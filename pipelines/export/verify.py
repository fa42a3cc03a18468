"""Verification: compare a pipeline loaded by plain diffusers with the trainer's own sampler on stored noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition
from distill.diffusion.student import Student
from distill.networks.negative_attention import adapters, with_negative_prompt
from distill.random import Draw
from pipelines.components import Pipeline
from pipelines.teacher import Teacher

TOLERANCE = 1e-3  # largest difference of an image in [0, 1]
LARGEST = 0.25  # limit of the difference for weights in half precision
PSNR = 40.0  # decibels, for weights in half precision
NEGATIVE = "blurry, grey"  # negative prompt of the comparison for a student that takes one


@dataclass(frozen=True)
class Reference:
    """Results of the trainer's own sampler on stored noise: z [n, *shape], images [n, C, (T,) H, W] in [0, 1].

    extra: a condition [1, ...] beside the prompts, for example a control image; the pipeline must be given it too.
    """

    prompts: tuple[str | int, ...]
    z: Tensor
    images: Tensor
    negative: str | None = None  # negative prompt of all images
    extra: Condition = None


class Gap(NamedTuple):
    """Difference of images in [0, 1] from the student's: the largest difference, and the PSNR in decibels."""

    largest: float
    psnr: float

    def __str__(self) -> str:
        return f"{self.largest:.2g}, PSNR {self.psnr:.1f} dB"


class GlobalGeneratorDraw(Draw):
    """Noise in the order in which a diffusers pipeline draws it from the device's global generator."""

    def __init__(self, teacher: Teacher, device: torch.device | str = "cpu") -> None:
        super().__init__(0, 0, "export", torch.zeros(0, device=device))
        self.draw_noise = teacher.family.draw_noise

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        with self.device:  # schedulers draw on it: a GPU gives other numbers
            return self.draw_noise(shape)


@contextmanager
def exact_arithmetic(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed`, and products in full float32: TF32 alone changes an image by more than TOLERANCE."""
    cuda = [device] if device.type == "cuda" else []
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with torch.random.fork_rng(cuda):
            torch.manual_seed(seed)
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def verification_device(net: nn.Module) -> torch.device:
    """A GPU that can hold the network in float32 and the pass of one sample, else the CPU."""
    size = sum(p.numel() * 4 for p in net.parameters())
    torch.cuda.empty_cache()  # release memory that training has freed
    fits = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.5 * size
    return torch.device("cuda", torch.cuda.current_device()) if fits else torch.device("cpu")


def place_pipeline(pipe: Pipeline, device: torch.device) -> Pipeline:
    """Move the pipeline to the device. On a GPU one component at a time."""
    pipe.set_progress_bar_config(disable=True)
    if device.type == "cuda":
        pipe.enable_model_cpu_offload(device=device)
    return pipe


@torch.no_grad()
def sample_reference(student: Student, teacher: Teacher, net: nn.Module, extra: Condition = None) -> Reference:
    """Samples of the student with the weights `net`, one by one, from noise of fixed seeds. extra: see `Reference`."""
    prompts = tuple(teacher.family.examples(teacher))
    device = verification_device(net)
    z = torch.randn(len(prompts), *teacher.shape, generator=torch.Generator().manual_seed(0))
    negative = NEGATIVE if adapters(net) else None
    conditions = encode_separately(teacher, prompts, negative, device)
    before = next(net.parameters()).device
    samples = []
    roles = net, *(expert.net for expert in student.experts)
    for role in roles:
        role.to(device)
    for i, condition in enumerate(conditions):
        c = {key: value.to(device) for key, value in ((condition or {}) | (extra or {})).items()}
        with exact_arithmetic(i, device):
            draw = GlobalGeneratorDraw(teacher, device)
            samples.append(student.with_network(net).generate(z[i : i + 1].to(device), c or None, draw))
    for role in roles:
        role.to(before)
    with exact_arithmetic(0, device):  # network and decoder are never on the device together
        images = torch.cat([teacher.decode(x).cpu() for x in samples])
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    return Reference(prompts, z, images, negative, extra)


def encode_separately(
    teacher: Teacher, prompts: Sequence[str | int], negative: str | None, device: torch.device
) -> list[Condition]:
    """The condition of each prompt, with the negative prompt if there is one. The encoders are freed at the end."""
    teacher.parts.drop_text()  # it may be on another device
    teacher.parts.device = device
    with exact_arithmetic(0, device):
        conditions = [teacher.encode([prompt]) for prompt in prompts]
        if negative:
            conditions = [with_negative_prompt(c, teacher.negative([negative])) for c in conditions]
    teacher.parts.drop_text()
    return conditions


@torch.no_grad()
def compare(pipe: Pipeline, teacher: Teacher, expected: Reference, steps: int) -> Gap:
    """Difference of a pipeline's images from the reference; nan if one is not finite.

    pipe: a pipeline that gives its network the reference's extra condition by itself (controlnet.ControlledPipeline).
    """
    family = teacher.family
    gaps = []
    device = pipe._execution_device
    for i, prompt in enumerate(expected.prompts):
        with exact_arithmetic(i, device):
            z = expected.z[i : i + 1].to(device)
            image = family.sample(pipe, [prompt], z, steps, family.no_guidance, expected.negative)
        gaps.append(image.float().cpu().clamp(0, 1) - expected.images[i : i + 1])
    gap = torch.cat(gaps).double()
    return Gap(float(gap.abs().max()), float(-10 * gap.square().mean().log10()))
