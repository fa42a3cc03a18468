"""A student as a pipeline folder that plain diffusers loads; reloaded and compared before it is called done."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from distill.draw import Draw
from distill.lora import merged
from distill.student import Student
from pipelines import FAMILIES, ExportError, Teacher

TOLERANCE = 1e-3  # largest difference of an image in [0, 1]

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusers, one-step, distillation]
---
# {name}

A student distilled to {steps} network call(s); plain diffusers runs it:

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("this folder")
images = pipe(batch_size=10, class_labels=list(range(10)), num_inference_steps={steps}).images
```

Guidance is built in. The student inherits the licence of its teacher and of the teacher's data. Its training:

```yaml
{config}```
"""


def family(teacher: Teacher) -> ModuleType:
    """The module of this package for the teacher's pipeline."""
    return importlib.import_module(f"pipelines.{FAMILIES[type(teacher.pipe).__name__]}")


def export(student: Student, teacher: Teacher, net: nn.Module, folder: Path, config: str) -> float:
    """Write `net` (the student's averaged weights) as a pipeline folder; the largest image difference after reloading.

    config: the resolved configuration, kept in distill.json and on the card. An ExportError, and no folder, if the
    reloaded pipeline does not sample what the student samples.
    """
    net = merged(net)
    pipe = family(teacher).export(student, teacher, net)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial, safe_serialization=True)
    steps = len(student.times)
    facts = {"student": True, "steps": steps, "times": list(student.times), "config": config}
    (partial / "distill.json").write_text(json.dumps(facts, indent=1))
    (partial / "README.md").write_text(CARD.format(name=folder.parent.name, steps=steps, config=config))
    gap = verify(student, teacher, net, partial)
    if not gap <= TOLERANCE:
        raise ExportError(f"the exported pipeline differs from the student by {gap:.2g} (limit {TOLERANCE}): {partial}")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return gap


@torch.no_grad()
def verify(student: Student, teacher: Teacher, net: nn.Module, folder: Path, B: int = 8) -> float:
    """Largest difference, in [0, 1] images, between the folder run by plain diffusers and the student's own sampler."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(B) % 10
    noise = _Generated(0)
    device = next(net.parameters()).device
    z = noise.normal("z", (B, *teacher.shape)).to(device)
    expected = teacher.decode(student.using(net).generate(z, teacher.encode(labels.to(device)), noise)).cpu() / 2 + 0.5
    steps, generator = len(student.times), torch.Generator().manual_seed(0)
    got = pipe(B, class_labels=labels, num_inference_steps=steps, generator=generator, output_type="np").images
    return float((torch.from_numpy(got).permute(0, 3, 1, 2) - expected).abs().max())


class _Generated(Draw):
    """Noise in the order in which a diffusers pipeline takes it from one torch.Generator."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, 0, "export", torch.zeros(0))
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)
