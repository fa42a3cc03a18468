"""Pipelines in turn on one image: a base model before its student, a small model before a large one.

    from diffusers import DiffusionPipeline
    from pipelines.inference.stitch import SamplingStage, stitch

    base, student = (DiffusionPipeline.from_pretrained(folder) for folder in ("sdxl", "sdxl-dmd2"))
    stages = [SamplingStage(base, 20, guidance=7, solver="ddim"), SamplingStage(student, 4, skip=1)]
    images = stitch(stages, ["a red fox"], [generator])

This has the diversity of the base model, because the student's first call determines the content of an image. Of its 20
calls the base makes those at higher noise levels than the student's second call (Gandikota & Bau 2025, arXiv
2503.10637). T-Stitch (Pan et al. 2024, 2402.14167) has the stages (small, 50, w, solver="ddim") and (large, 50, w,
skip=20, solver="ddim"), two models of the same latents. Three stages work, too. The equations are in solver.py;
eval.generate has --first.

The base needs enough steps. On the digits, one seed, a CD student of two calls has recall .851 and FD 14.2; after six
of ten of its teacher's Heun steps (25 passes for 2) .894 and 13.0, after two of four .901 and 297.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.diffusion.schedule import EDM, VP
from distill.diffusion.solver import STEPS, Call, Name, join_calls, run_calls
from distill.diffusion.student import Student
from distill.random import Draw
from pipelines.components import Parts, Pipeline, Scheduler, locate_pipeline
from pipelines.teacher import Teacher, teacher_of

FRESH = ("LCMScheduler", "CMStochasticIterativeScheduler", "SCMScheduler")  # they add new noise to x0 between calls
ODE = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")  # they keep the predicted noise


@dataclass(frozen=True, eq=False)
class SamplingStage:
    """One stage of a stitched sampler: the calls of a pipeline's scheduler or a solver, without the first `skip`."""

    pipe: Pipeline | Teacher  # a diffusers pipeline, or a Teacher
    steps: int  # number of steps of the complete sampler
    guidance: float = 1.0  # lambda with the solver cfg++; students have none
    skip: int = 0  # number of its first calls that the stages before it replace
    solver: Name | None = None  # step between calls; None: the scheduler's (LCM, Euler, DDIM, flows' Euler ...)

    def calls(self, teacher: Teacher, draw: Draw) -> list[Call]:
        """All calls of the stage; noise between them comes from `draw`. ValueError for a scheduler without a solver."""
        if teacher.parts.index.get("boundary_ratio") is not None:
            raise ValueError(f"{teacher.parts.folder} has two networks, and a turn calls one: use it as it is")
        scheduler = teacher.parts.scheduler()
        kind = type(scheduler).__name__
        times = stage_times(teacher, scheduler, self.steps, self.solver)
        anew = kind in FRESH or bool(scheduler.config.get("stochastic_sampling"))
        if self.solver is None and (kind not in FRESH + ODE or scheduler.config.get("clip_sample")):
            raise ValueError(f"what {kind} does between two calls is none of our steps: give solver, {sorted(STEPS)}")
        denoiser: Any = teacher.denoiser  # or a Guided, which is called as one
        if self.guidance != 1 or self.solver == "cfg++":
            if not isinstance(denoiser.schedule, EDM):
                teacher.null()
            denoiser = teacher.family.guided(denoiser, self.guidance)
        scale = None  # scale of the first noise, as in the pipeline; its Euler scheduler keeps x / alpha
        if isinstance(denoiser.path, VP):
            start = torch.tensor(float(scheduler.init_noise_sigma))
            scale = float(scheduler.scale_model_input(start, scheduler.timesteps[0]))
        if self.solver is None and anew:
            return Student(denoiser, times, scale).calls(draw)
        return [Call(denoiser, t, STEPS[self.solver or "ddim"], scale) for t in times]


def stage_times(teacher: Teacher, scheduler: Scheduler, steps: int, solver: Name | None = None) -> tuple[float, ...]:
    """The decreasing times of a pipeline's calls: its scheduler's; for an EDM teacher with a solver, EDM's grid."""
    schedule = teacher.denoiser.schedule
    times = teacher.family.call_times(scheduler, steps)
    if isinstance(schedule, EDM) and solver is not None:
        t = torch.linspace(1, 0, steps, dtype=torch.float64)
    elif times is not None:
        t = torch.tensor(times, dtype=torch.float64)
    else:
        teacher.set_timesteps(scheduler, steps)
        told = scheduler.timesteps.double().cpu()
        ratios = scheduler.sigmas[: len(told)].double().cpu() if isinstance(schedule, EDM) else None
        t = told / schedule.native(torch.ones(1)) if ratios is None else schedule.time(ratios)
    return tuple(sorted({*t.tolist()}, reverse=True))  # PNDM's and Heun's call twice at one level


def teacher_from_pipeline(pipe: Pipeline, resolution: int | None = None) -> Teacher:
    """The teacher with the components of a loaded pipeline, from a folder or the Hub."""
    parts = Parts(locate_pipeline(str(pipe.config._name_or_path)))
    parts.given = {name: value for name, value in pipe.components.items() if value is not None}
    parts.device = pipe.device
    return teacher_of(parts, resolution)


class GeneratorsDraw(Draw):
    """Noise of every image from its own generator, on the CPU."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__(0, 0, "stitch", torch.zeros(0))
        self.generators = generators

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in self.generators])


@torch.no_grad()
def stitch(
    turns: Sequence[SamplingStage], prompts: Sequence[str | int], generators: Sequence[torch.Generator]
) -> Tensor:
    """Images [B, C, (T,) H, W] in [-1, 1] for B prompts (or labels), each with noise from its own generator.

    The last pipeline encodes prompts and decodes samples: all stages use the same texts and latents. ValueError if the
    stages' noise levels do not follow one another.
    """
    teachers = [turn.pipe if isinstance(turn.pipe, Teacher) else teacher_from_pipeline(turn.pipe) for turn in turns]
    last = teachers[-1]
    draw = GeneratorsDraw(generators)
    calls = list[Call]()
    for turn, teacher in zip(turns, teachers, strict=True):
        own = turn.calls(teacher, draw)
        joined = join_calls(calls, own, turn.skip)
        if calls and len(joined) == len(own) - turn.skip:
            raise ValueError(
                f"skip is {turn.skip}, and the pipeline before would do nothing: skip a call, or leave it out"
            )
        calls = joined
    like = next(last.denoiser.net.parameters())
    c = {key: value.to(like.device) for key, value in (last.encode(prompts) or {}).items()}
    z = draw.normal("z", (len(prompts), *last.shape)).to(like)
    return last.decode(run_calls(calls, z, c or None)).clamp(-1, 1)
