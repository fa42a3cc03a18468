"""A student as a pipeline folder that plain diffusers loads; reloaded and compared before it is called done.

python -m pipelines.export runs/dmd2_sdxl                       again, from the newest checkpoint of a run
python -m pipelines.export --from FILE --pretrained_model_name_or_path BASE --output_dir OUT      a published student
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.draw import Draw
from distill.lora import merged
from distill.student import Student
from pipelines import ExportError, Teacher

TOLERANCE = 1e-3  # largest difference of an image in [0, 1]
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


def export(student: Student, teacher: Teacher, net: nn.Module, scheduler: Any, folder: Path, config: str) -> float:
    """Write `net` (the student's averaged weights) as a pipeline folder; the largest image difference after reloading.

    Text encoders, tokenizers and VAE are the teacher's files, byte for byte; ours are the network and `scheduler`
    (pipelines/scheduler.py). config: the resolved configuration, kept in distill.json. An ExportError, and no folder,
    if the reloaded pipeline does not sample what the student samples.
    """
    from diffusers import DiffusionPipeline

    expected = reference(student, teacher, net)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(teacher, merged(net), scheduler, partial)
    steps = len(student.times)
    facts = {"student": True, "steps": steps, "times": list(student.times), "config": config}
    (partial / "distill.json").write_text(json.dumps(facts, indent=1))
    pipe = DiffusionPipeline.from_pretrained(partial, local_files_only=True)
    gap = compare(pipe.to(next(net.parameters()).device), teacher, expected, steps)
    if not gap <= TOLERANCE:
        raise ExportError(f"the exported pipeline differs from the student by {gap:.2g} (limit {TOLERANCE}): {partial}")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return gap


def write(teacher: Teacher, net: nn.Module, scheduler: Any, folder: Path) -> None:
    """The pipeline folder of the teacher with another network and scheduler."""
    parts = teacher.parts
    index = dict(parts.index)
    for name, entry in parts.index.items():
        if isinstance(entry, list) and entry[0] is not None and name not in (parts.network, "scheduler"):
            copy(parts.folder / name, folder / name, parts.variant)
    for file in parts.folder.glob("LICENSE*"):
        shutil.copy(file, folder / file.name)
    net.save_pretrained(folder / parts.network, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index["_name_or_path"] = ""
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")  # model.safetensors, not model.fp16.safetensors
WEIGHTS = re.compile(r".+\.(safetensors|bin|msgpack|onnx|onnx_data|h5|ckpt|pt|pth|xml)(\.index.*)?")


def copy(source: Path, target: Path, variant: str | None) -> None:
    """A component's files as they are: of several sets of weights the one that was loaded, under its plain name."""
    files = [f for f in sorted(source.rglob("*")) if f.is_file()]
    tag = f".{variant}"
    tagged = [f for f in files if variant and ".safetensors" in f.name and tag in f.name]
    for file in files:
        if WEIGHTS.fullmatch(file.name) and file not in tagged and (tagged or not PLAIN.fullmatch(file.name)):
            continue
        to = target / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if file not in tagged:
            shutil.copy(file, to)
        elif file.suffix == ".json":  # the index of the shards names them
            to.with_name(file.name.replace(tag, "")).write_text(file.read_text().replace(tag, ""))
        else:
            shutil.copy(file, to.with_name(file.name.replace(tag, "")))
