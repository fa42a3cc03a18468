"""Measure how well an exported student with a ControlNet follows a control image.

python -m pipelines.control FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
import yaml

from distill.configuration import fail
from distill.diffusion.student import Student
from distill.layout import program_name
from distill.ranges import Count, Seed
from distill.training.checkpoint import describe_disk_error
from distill.training.config import StudentConfig
from pipelines import fields
from pipelines.export.schedule import find_student_scheduler, student_config_of_export
from pipelines.export.verify import GlobalGeneratorDraw
from pipelines.inference import controlnet
from pipelines.teacher import load_teacher


@dataclass(frozen=True)
class Arguments:
    """Measure how well an exported student follows control images, made from its own samples of other noise."""

    folder: Annotated[str, tyro.conf.Positional]  # folder of the exported pipeline
    n: Count = 64  # number of noise batches, each with every example prompt of the family
    seed: Seed = 0  # seed of the noise


@torch.no_grad()
def measure_control_error(arguments: Arguments) -> dict[str, float]:
    """Mean |c(x) - y| for y = c(f(z)): x = f'(z', y) under the key "told", x = f(z') without the image under "untold".

    ValueError if the folder has no adapter or no configuration of a control.
    """
    folder = Path(arguments.folder)
    if not (folder / controlnet.FOLDER).is_dir():
        raise ValueError(
            f"{folder} has no {controlnet.FOLDER}: give the folder of an exported pipeline with an adapter"
        )
    teacher = load_teacher(arguments.folder)
    try:
        tree = yaml.safe_load(fields.facts(folder).get("config", ""))["method"]
        picture = controlnet.picture_extractor(teacher, tree["control"], tree["factor"])
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError):
        facts = folder / "distill.json"
        raise ValueError(f"{facts} holds no configuration of a control: export the run again") from None
    controlnet.install_adapter(teacher)
    teacher.denoiser.net.control = controlnet.load_adapter(folder)
    config = student_config_of_export(teacher, StudentConfig())
    student = Student(teacher.denoiser, find_student_scheduler(teacher, config)[1], config.scale, config.renoise)
    prompts = teacher.family.examples(teacher)
    c = teacher.encode(prompts) or {}
    draw = GlobalGeneratorDraw(teacher)
    gaps = []
    generator = torch.Generator().manual_seed(arguments.seed)
    for _ in range(arguments.n):
        z, other = torch.randn(2, len(prompts), *teacher.shape, generator=generator)
        y = picture(student.generate(z, c, draw))
        pictures = (picture(student.generate(other, condition, draw)) for condition in (c | {"control": y}, c))
        gaps.append(torch.stack([(seen - y).abs().mean() for seen in pictures]))
    return dict(zip(("told", "untold"), torch.stack(gaps).mean(0).tolist(), strict=True))


def main(arguments: Arguments | None = None) -> None:
    arguments = arguments or tyro.cli(Arguments, use_underscores=True, description=__doc__, prog=program_name())
    try:
        found = measure_control_error(arguments)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if not (why := describe_disk_error(error)) and isinstance(error, MemoryError | RuntimeError):
            raise
        fail(why or str(error))
    sys.stdout.write(json.dumps(found) + "\n")
