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


@torch.no_grad()
def reference(student: Student, teacher: Teacher, net: nn.Module) -> Reference:
    """Samples of the student with the weights `net`, one by one, from noise of fixed seeds."""
    prompts = getattr(teacher.parts.family, "EXAMPLES", EXAMPLES)
    device, noise, found = next(net.parameters()).device, Generated(teacher), []
    z = torch.randn(len(prompts), *teacher.shape, generator=torch.Generator().manual_seed(0))
    for i, prompt in enumerate(prompts):
        c = {key: value.to(device) for key, value in (teacher.encode([prompt]) or {}).items()}
        with torch.random.fork_rng():
            torch.manual_seed(i)
            found.append(teacher.decode(student.using(net).generate(z[i : i + 1].to(device), c or None, noise)).cpu())
    return Reference(tuple(prompts), z, (torch.cat(found).float() / 2 + 0.5).clamp(0, 1))


@torch.no_grad()
def compare(pipe: Any, teacher: Teacher, expected: Reference, steps: int) -> float:
    """Largest difference between a pipeline's images and the reference; nan where one is not finite."""
    family, gaps = teacher.parts.family, []
    pipe.set_progress_bar_config(disable=True)
    for i, prompt in enumerate(expected.prompts):
        with torch.random.fork_rng():
            torch.manual_seed(i)
            z = expected.z[i : i + 1].to(pipe.device)
            image = family.sample(pipe, [prompt], z, steps, family.UNCONDITIONAL)
        gaps.append((image.float().cpu().clamp(0, 1) - expected.images[i : i + 1]).abs().max())
    return float(torch.stack(gaps).max())
