"""Rehearse the export with the untrained student before the first step of a run.

It covers everything that `pipelines.export` verifies at the end, except the weights: the student's scheduler, written
and read again, the pipeline's class and call, the encoding of a condition, the sampler, the autoencoder, the model
card. A `StandIn` replaces the network. Its output depends on each input. It takes no time at any size, needs no device
and no half precision, and works for networks that are sharded later. The cost is one prompt through the text encoders
and two images through the decoder, on the CPU.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.diffusion.end_time import remove_end_time
from distill.diffusion.schedule import Kind
from distill.diffusion.student import Student
from distill.training.config import StudentConfig
from pipelines.components import ExportError, Parts, Pipeline, Scheduler
from pipelines.export.model_card import CardInfo, render_model_card
from pipelines.export.verify import TOLERANCE, GlobalGeneratorDraw, exact_arithmetic
from pipelines.inference import controlnet
from pipelines.teacher import Teacher

CPU = torch.device("cpu")
SHARE = {
    "eps": 0.05,
    "flow": 0.7,
}  # fraction of the wave in the output; the rest is the input, so x0 has the scale of data


class StandIn(nn.Module):
    """A network with the config and attributes of `net`. Its output is a wave in x, shifted by the other inputs.

    Masks cause no shift, because pipelines may omit padding. It has no weights, and its device is the CPU.
    """

    dtype = torch.float32
    device = CPU

    def __init__(self, net: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.original = (net,)  # a tuple, so that it is not a submodule
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"][0], name)

    def cache_context(self, *args: object, **options: object) -> AbstractContextManager[None]:
        """A context that pipelines enter around a call."""
        return nullcontext()

    def forward(self, *args: object, **options: object) -> tuple[Tensor]:
        given = inspect.signature(type(self.original[0]).forward).bind(self, *args, **options).arguments
        _, (_, x), *others = given.items()
        phase = sum(shift(name, value) for name, value in others)
        wave = (2 * x.double() + phase).sin()
        out = x + SHARE[self.kind] * wave if self.kind in SHARE else wave
        if type(self.original[0]).__name__ == "PixArtTransformer2DModel":
            out = torch.cat([out, wave], dim=1)  # a learned variance
        return (out.float(),)


def shift(name: str, value: object) -> float:
    """Shift of the wave by an input; only tensors shift it."""
    if isinstance(value, dict):
        return sum(shift(key, inner) for key, inner in sorted(value.items()))
    if not isinstance(value, Tensor) or "mask" in name:
        return 0.0
    if name in ("timestep", "t"):
        t = value.double().mean()
        return float(10 * t.sign() * t.abs().log1p())
    flat = value.double().flatten()
    weights = (1.7 * torch.arange(len(flat), dtype=torch.float64)).cos()
    return float((flat * weights).sum() / (1 + flat.count_nonzero()).sqrt())  # independent of zeros at the end


@contextmanager
def on_cpu(parts: Parts) -> Iterator[None]:
    """Move text encoders and autoencoder to the CPU. Encoders loaded for this are freed at the end."""
    device = parts.device
    threads = torch.get_num_threads()
    before = {name: vars(parts)[name] for name in ("text", "vae") if name in vars(parts)}
    if "text" in before:
        setattr(before["text"], parts.network, None)  # SD3's text pipeline refers to the network, which must not move
    if device.type != "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # the other processes are waiting
    parts.device = CPU
    try:
        for part in before.values():
            part.to(CPU)
        yield
    finally:
        torch.set_num_threads(threads)
        parts.device = device
        for name in ("text", "vae"):
            if name in before:
                before[name].to(device)
            else:
                vars(parts).pop(name, None)


def rehearse(student: Student, teacher: Teacher, scheduler: Scheduler, card: CardInfo) -> None:
    """Sample one image with the exported student's pipeline and with the student's sampler, and write the card.

    ExportError, in one line, if they differ or anything fails. It draws none of the run's random numbers.
    """
    name = f"{teacher.parts.index['_class_name']} under {type(scheduler).__name__}"
    try:
        with on_cpu(teacher.parts), exact_arithmetic(0, CPU), torch.no_grad():
            gaps = differences(student, teacher, scheduler, card)
    except (ValueError, ExportError):
        raise
    except Exception as error:  # pipelines, encoders and autoencoders raise many kinds of errors
        raise ExportError(
            f"the export cannot be made: rehearsed with the untrained student, {name} fails with "
            f"{type(error).__name__}: {error}. Nothing was trained. Compare the configs of the teacher's folder with "
            "those of a published pipeline of its kind"
        ) from error
    for steps, gap in gaps.items():
        if not gap <= TOLERANCE:
            raise ExportError(
                f"the export would not be the student: rehearsed with the untrained student, an image of {name} in "
                f"{steps} step(s) differs from the student's own by {gap:.2g} (limit {TOLERANCE}). Nothing was "
                "trained. Compare the configs of the teacher's scheduler and VAE with those of a published pipeline "
                "of its kind"
            )


def differences(student: Student, teacher: Teacher, scheduler: Scheduler, card: CardInfo) -> dict[int, float]:
    """{steps: largest difference of an image in [0, 1]} between the pipeline and the student's sampler."""
    from pipelines.export.schedule import find_student_scheduler as carrying

    parts = teacher.parts
    family = teacher.family
    base = controlnet.without_controlnet(remove_end_time(student.denoiser))
    call = family.export_call(base.call)
    denoiser = replace(base, net=StandIn(base.net, base.kind), call=call)
    one = replace(student, denoiser=denoiser, experts=(), phases=1, jumps=False)
    prompt = teacher.family.examples(teacher)[0]
    c = teacher.encode([prompt])
    pipe = pipeline_without_network(parts, scheduler)
    pipe.register_modules(**{parts.network: denoiser.net})
    students = {len(one.times): one}
    for n in family.verified_steps(parts):
        students.setdefault(n, replace(one, times=carrying(teacher, StudentConfig(steps=n))[1]))
    shape = (teacher.shape[0], 1, *teacher.shape[2:]) if len(teacher.shape) == 4 else teacher.shape  # one frame
    z = torch.randn(1, *shape)
    gaps = {}
    for n, each in students.items():
        with exact_arithmetic(n, CPU):
            x = each.generate(z, c, GlobalGeneratorDraw(teacher))
        image = (teacher.decode(x).float() / 2 + 0.5).clamp(0, 1)
        with exact_arithmetic(n, CPU):
            made = family.sample(pipe, [prompt], z, n, family.no_guidance, None)
        gaps[n] = float((made.float().clamp(0, 1) - image).abs().max())
    render_model_card(one, teacher, scheduler, card, prompt, "", [])
    return gaps


def pipeline_without_network(parts: Parts, scheduler: Scheduler) -> Pipeline:
    """The pipeline without its network: the loaded components, and the scheduler written and read back."""
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        again = type(scheduler).from_pretrained(folder)
    given = parts.text.components | {"vae": parts.vae} if "vae" in parts.index else {}
    return parts.pipeline(given | {parts.network: None, "scheduler": again})
