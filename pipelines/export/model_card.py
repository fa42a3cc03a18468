"""The facts of a student's model card: its run, its call, its verification."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.diffusion.student import Student
from pipelines.components import Scheduler
from pipelines.export.card import Card, Result, render_program
from pipelines.export.license import UNKNOWN, License, find_license
from pipelines.export.verify import Gap
from pipelines.families.latents import factor
from pipelines.teacher import Teacher


@dataclass(frozen=True)
class CardInfo:
    """Facts of a model card beyond the student's weights. config: the resolved configuration, YAML."""

    name: str  # name of the student, in titles and file names
    base: str | Path  # the teacher: a name on the Hub or a folder
    license: License
    method: str
    config: str = ""
    model: str | None = None  # the student's name on the Hub, from which the card loads it; None: the folder itself
    results: Sequence[Result] = ()
    source: str = "the student's weights"  # reference of the verification
    notes: Sequence[str] = ()  # notes about that source


def collect_card_info(
    name: str, teacher: Teacher, base: str, method: str, config: str, license: str | None, model: str | None
) -> CardInfo:
    """The facts of a card. license: the value of --license. A published student (model) needs a known license."""
    try:
        known = find_license(teacher.parts.folder if Path(base).exists() else base, license)
    except ValueError:
        if model:
            raise
        known = UNKNOWN
    return CardInfo(re.sub(r"[^\w.-]+", "-", name), base, known, method, config, model)  # part of file names


def describe_verification(info: CardInfo, gap: Gap, n: int) -> str:
    """The card's text about the verification and its reference."""
    return " ".join(
        (
            f"Plain diffusers loaded this folder again. From the same noise, its images of {n} conditions differ by at",
            f"most {gap.largest:.1e} (of a range of 1) from those of the training code's sampler with {info.source}.",
            *info.notes,
        )
    )


def absent_components(teacher: Teacher) -> list[str]:
    """Components that from_pretrained expects and the teacher's folder lacks (SD3 without T5)."""
    import diffusers

    optional = getattr(diffusers, teacher.parts.index["_class_name"])._optional_components
    return [n for n, entry in teacher.parts.index.items() if entry == [None, None] and n not in optional]


def render_model_card(
    student: Student,
    teacher: Teacher,
    scheduler: Scheduler,
    info: CardInfo,
    where: str | Path,
    prompt: str | int,
    lora: str,
    limits: Sequence[str],
    beside: Sequence[str] = (),
    checked: str = "",
) -> str:
    """The model card. checked: what was verified."""
    family = teacher.family
    steps = len(student.times)
    absent = absent_components(teacher)
    program = render_call(teacher, steps, prompt)
    with_lora = render_program(program, where, info.base, lora, type(scheduler).__name__, absent) if lora else ""
    card = Card(
        info.name,
        info.base,
        info.license,
        family.name,
        info.method,
        steps,
        info.config,
        code=render_program(program, where, absent=absent),
        lora=with_lora,
        task=family.task,
        samples="samples.png",
        prompt=str(prompt),
        limits=limits,
        results=info.results,
        files=beside,
        checked=checked,
    )
    return card.render()


def render_call(teacher: Teacher, steps: int, prompt: str | int) -> str:
    """The call in a card, with the size of the samples, which some pipelines do not store."""
    family = teacher.family
    if family.render_call is not None:
        return family.render_call(steps, prompt)
    height, width = (side * factor(teacher.parts) for side in teacher.shape[-2:])
    options: dict[str, object] = {"height": height, "width": width, "num_inference_steps": steps}
    options |= family.call_options(teacher.parts, steps)
    if "frames" in teacher.parts.asked:
        options["num_frames"] = teacher.parts.asked["frames"]
    given = ", ".join([json.dumps(prompt), *(f"{name}={value!r}" for name, value in options.items())])
    made = "video = {}.frames[0]" if len(teacher.shape) == 4 else "image = {}.images[0]"
    return made.format(f"pipe({given})")
