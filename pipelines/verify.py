"""Verification: a pipeline, as plain diffusers loads it, against the trainer's own sampler on stored noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.draw import Draw
from distill.student import Student
from pipelines import Teacher

TOLERANCE = 1e-3  # largest difference of an image in [0, 1]
HALF = 3e-2  # of files whose weights are rounded to half precision
EXAMPLES = ("a photo of a red fox in the snow", "an old man reading a newspaper under a lamp")


@dataclass(frozen=True)
class Reference:
    """What the trainer's own sampler makes of stored noise: z [n, *shape], images [n, C, (T,) H, W] in [0, 1]."""

    prompts: tuple[Any, ...]
    z: Tensor
    images: Tensor


class Generated(Draw):
    """Noise in the order in which a diffusers pipeline takes it from torch's global generator."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(0, 0, "export", torch.zeros(0))
        self.unpacked = getattr(teacher.parts.family, "unpacked", lambda shape: torch.randn(shape))

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.unpacked(shape)


def place(net: nn.Module) -> torch.device:
    """A GPU that holds the network in float32 and the pass of one sample, else the CPU."""
    size = sum(p.numel() * 4 for p in net.parameters())
    fits = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.5 * size
    return torch.device("cuda", torch.cuda.current_device()) if fits else torch.device("cpu")


def settled(pipe: Any, device: torch.device) -> Any:
    """The pipeline on the device; on a GPU one component at a time."""
    pipe.set_progress_bar_config(disable=True)
    if device.type == "cuda":
        pipe.enable_model_cpu_offload(device=device)
    return pipe


@torch.no_grad()
def reference(student: Student, teacher: Teacher, net: nn.Module) -> Reference:
    """Samples of the student with the weights `net`, one by one, from noise of fixed seeds."""
    prompts, device = getattr(teacher.parts.family, "EXAMPLES", EXAMPLES), place(net)
    z = torch.randn(len(prompts), *teacher.shape, generator=torch.Generator().manual_seed(0))
    teacher.parts.device = device
    encoded = [teacher.encode([prompt]) for prompt in prompts]
    teacher.parts.drop_text()
    before, found = next(net.parameters()).device, []
    net.to(device)
    for i, given in enumerate(encoded):
        c = {key: value.to(device) for key, value in (given or {}).items()}
        with torch.random.fork_rng():
            torch.manual_seed(i)
            x = student.using(net).generate(z[i : i + 1].to(device), c or None, Generated(teacher))
            found.append(teacher.decode(x).cpu())
    net.to(before)
    return Reference(tuple(prompts), z, (torch.cat(found).float() / 2 + 0.5).clamp(0, 1))


@torch.no_grad()
def compare(pipe: Any, teacher: Teacher, expected: Reference, steps: int) -> float:
    """Largest difference between a pipeline's images and the reference; nan where one is not finite."""
    family, gaps, device = teacher.parts.family, [], pipe._execution_device
    for i, prompt in enumerate(expected.prompts):
        with torch.random.fork_rng():
            torch.manual_seed(i)
            z = expected.z[i : i + 1].to(device)
            image = family.sample(pipe, [prompt], z, steps, family.UNCONDITIONAL)
        gaps.append((image.float().cpu().clamp(0, 1) - expected.images[i : i + 1]).abs().max())
    return float(torch.stack(gaps).max())
