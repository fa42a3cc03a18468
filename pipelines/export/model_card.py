"""The facts of a student's model card: its run, its call, its verification."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.diffusion.student import Student
from pipelines.components import Scheduler
from pipelines.export.card import PLACEHOLDER, Card, Result, render_program
from pipelines.export.license import (
    UNKNOWN,
    License,
    fetch_license_files,
    find_license,
    hub_name,
    is_license_file,
    license_source,
    refuse_public_push,
)
from pipelines.export.usage import describe_usage
from pipelines.export.verify import LARGEST, PSNR, TOLERANCE, Gap
from pipelines.families.latents import factor
from pipelines.markdown import escape_markdown
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
    name: str,
    teacher: Teacher,
    base: str,
    method: str,
    config: str,
    license: str | None,
    model: str | None,
    public: bool = False,
) -> CardInfo:
    """The facts of a card. license: the value of --license. model: name on the Hub of a student that is pushed.

    ValueError if the licence of a pushed student is not known, or does not allow a public one.
    """
    folder = teacher.parts.folder
    fetch_license_files(folder)
    try:
        known = find_license(license_source(base, folder), license)
    except ValueError:
        if model:
            raise
        known = UNKNOWN
    if public:
        refuse_public_push(base, folder, known)
    return CardInfo(re.sub(r"[^\w.-]+", "-", name), base, known, method, config, model)  # part of file names


def describe_verification(info: CardInfo, gaps: Mapping[str, Gap], n: int) -> str:
    """The card's text about the verification and its reference. gaps: by pipeline and single file."""
    lines = [
        f"Plain diffusers loaded this folder again. From the same noise, its images of {n} conditions were compared",
        f"with those of the training code's sampler with {info.source}. The pipeline is compared in float32 and may",
        f"differ by {TOLERANCE:g} (of a range of 1).",
    ]
    if any(name.endswith(".safetensors") for name in gaps):
        lines += [f"A file in half precision may differ by {LARGEST:g}, with a PSNR of at least {PSNR:g} dB."]
    psnr = lambda gap: f"{gap.psnr:.1f} dB" if math.isfinite(gap.psnr) else "the same images"
    rows = [f"| {_in_code(name)} | {gap.largest:.1e} | {psnr(gap)} |" for name, gap in gaps.items()]
    table = "\n".join(["| loaded by diffusers | largest difference | PSNR |", "|---|---:|---:|", *rows])
    return f"{' '.join([*lines, *info.notes])}\n\n{table}"


def _in_code(name: str) -> str:
    return f"`{name}`" if name.endswith(".safetensors") else name


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
    prompt: str | int,
    lora: str,
    limits: Sequence[str],
    beside: Sequence[str] = (),
    checked: str = "",
) -> str:
    """The model card. lora: name of a LoRA file. beside: names of the folder's files. checked: what was verified."""
    family = teacher.family
    steps = len(student.times)
    model = info.model or f"{PLACEHOLDER}/{info.name}"
    base = hub_name(info.base)
    absent = absent_components(teacher)
    call = render_call(teacher, steps, prompt)
    program = lambda file: render_program(
        call,
        model,
        base or f"{PLACEHOLDER}/{Path(info.base).name}",
        file,
        type(scheduler).__name__,
        absent,
        example_dtype(teacher),
    )
    title = escape_markdown(base or Path(info.base).name)
    size = image_size(teacher)
    card = Card(
        info.name,
        info.base,
        info.license,
        family.name,
        info.method,
        steps,
        info.config,
        code=program(""),
        lora=program(lora) if lora else "",
        task=family.task,
        samples="samples.png",
        prompt=str(prompt),
        limits=limits,
        results=info.results,
        files=beside,
        checked=checked,
        usage=describe_usage(student, student.denoiser.net, title, size, beside),
        sampling=describe_calls(student, scheduler),
        terms=[name for name in beside if is_license_file(name)],
        model=info.model or "",
    )
    return card.render()


def describe_calls(student: Student, scheduler: Scheduler) -> str:
    """The scheduler and the network's inputs at the student's calls."""
    denoiser = student.denoiser
    times = denoiser.schedule.time(denoiser.path.ratio(torch.tensor(student.times, dtype=torch.float64)))
    inputs = ", ".join(f"{n:.5g}" for n in denoiser.schedule.native(times).tolist())
    return f"calls: {type(scheduler).__name__}, the network's time input is {inputs}"


def example_dtype(teacher: Teacher) -> str:
    """The precision of the card's program: float16 for UNets of latents, float32 for pixels and Wan's VAE."""
    if "vae" not in teacher.parts.index:
        return "torch.float32"
    if teacher.parts.network == "unet":
        return "torch.float16"
    if teacher.parts.index["vae"][1] == "AutoencoderKLWan":
        return '{"default": torch.bfloat16, "vae": torch.float32}'
    return "torch.bfloat16"


def image_size(teacher: Teacher) -> tuple[int, int]:
    """(width, height) of the samples in pixels."""
    scale = factor(teacher.parts) if "vae" in teacher.parts.index else 1
    return teacher.shape[-1] * scale, teacher.shape[-2] * scale


def render_call(teacher: Teacher, steps: int, prompt: str | int) -> str:
    """The call in a card, with the size of the samples, which some pipelines do not store. It saves what it makes."""
    family = teacher.family
    if family.render_call is not None:
        return f'{family.render_call(steps, prompt)}\nimage.save("image.png")'
    width, height = image_size(teacher)
    options: dict[str, object] = {"height": height, "width": width, "num_inference_steps": steps}
    options |= family.call_options(teacher.parts, steps)
    if "frames" in teacher.parts.asked:
        options["num_frames"] = teacher.parts.asked["frames"]
    lines = [json.dumps(prompt), *(f"{name}={value!r}" for name, value in options.items())]
    given = "".join(f"    {line},\n" for line in lines)
    if len(teacher.shape) == 4:
        return f'video = pipe(\n{given}).frames[0]\nexport_to_video(video, "video.mp4", fps=16)'
    return f'image = pipe(\n{given}).images[0]\nimage.save("image.png")'
