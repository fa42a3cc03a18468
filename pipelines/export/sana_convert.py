"""Convert a SANA teacher to SANA-Sprint's form: normalised queries and keys, t in [0, 1], other weights unchanged.

python -m pipelines.sana TEACHER FOLDER
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from distill.configuration import fail
from distill.layout import program_name
from pipelines.export.folder import write_pipeline
from pipelines.families.sana import SPRINT, with_config
from pipelines.teacher import load_teacher


@dataclass(frozen=True)
class Arguments:
    """Convert a SANA teacher to SANA-Sprint's norms and times, with its other weights unchanged, for fine-tuning."""

    teacher: Annotated[str, tyro.conf.Positional]  # a folder, or a name on the Hub
    output_dir: Annotated[str, tyro.conf.Positional]  # folder to write
    variant: str | None = None  # variant of the teacher's weight files, for example fp16


def main(arguments: Arguments | None = None) -> None:
    arguments = arguments or tyro.cli(Arguments, use_underscores=True, description=__doc__, prog=program_name())
    folder = Path(arguments.output_dir)
    if folder.exists() and any(folder.iterdir()):
        fail(f"{folder} is not empty: choose another folder")
    try:
        teacher = load_teacher(arguments.teacher, variant=arguments.variant)
        if (kind := teacher.parts.index["_class_name"]) != "SanaPipeline":
            raise ValueError(f"{arguments.teacher} is a {kind}; give a SanaPipeline")
    except ValueError as error:
        fail(str(error))
    write_pipeline(teacher, with_config(teacher.denoiser.net, **SPRINT), teacher.parts.scheduler(), folder)
