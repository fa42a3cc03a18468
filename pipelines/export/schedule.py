"""The scheduler of an exported student. It is found first: the student is trained on the times that it returns.

A config carries the times, the scale of the input and the noise between calls, and nothing else. What no config can
carry is refused before training. Given times are searched in every config that a family can use:

    table, fresh noise, unit input     LCMScheduler: every grid of original_inference_steps   DMD2, VSD, LCM
    table, "tcd", unit input           TCDScheduler without new noise, on the same grids      PCM, TCD
    table, "ddim", input times sigma   EulerDiscreteScheduler: trailing; two times of any kind by sigma_min, sigma_max
    table, "ancestral", input sigma    EulerAncestralDiscreteScheduler: trailing             moment matching
    table, "ddim", unit input          DDIMScheduler: trailing; Euler's two times             SUN
    flow                               FlowMatchEuler: shift and shift_terminal; stochastic_sampling for fresh noise
    flow with a guidance input         SCM, which reads it on TrigFlow                        SANA-Sprint
    EDM                                CMStochasticIterative: rho and num_train_timesteps

A table is cut after the first call if that is below its end (DMD2 at 399, SiD-LSG at 625). Two calls may have any
times, three may on a flow. More calls may have the times that a config's parameters can express.
"""

from __future__ import annotations

import dataclasses

import torch

from distill.diffusion.transition import ANCESTRAL, DDIM, FRESH, TCD, Transition
from distill.training.config import StudentConfig
from pipelines import fields
from pipelines.components import Scheduler
from pipelines.families.base import Teacher
from pipelines.families.student_schedulers import Times, pipeline_times, times_gap


def find_student_scheduler(teacher: Teacher, student: StudentConfig) -> tuple[Scheduler, Times]:
    """(scheduler, times): a diffusers scheduler whose config carries the student, and its times.

    A ValueError says what a config cannot carry, and what it can.
    """
    schedule = teacher.denoiser.schedule
    if (
        student.times
        and (student.sigma or student.timestep)
        and abs(student.first_time(schedule) - student.times[0]) > 1e-4
    ):
        raise ValueError(
            f"student.times begin at {student.times[0]:.6g}, and student.sigma or timestep puts the first call at "
            f"{student.first_time(schedule):.6g}: pass --student.sigma None --student.timestep None"
        )
    found: list[Times] = []
    for candidate in teacher.family.student_schedulers(teacher, student):
        times = pipeline_times(teacher, candidate, student.steps)
        if student.times is None or times_gap(student.times, times) < 1e-4:
            return candidate, times
        found.append(times)
    if not found:
        raise ValueError(
            f"no diffusers scheduler supports {student.steps} calls of unit noise with 'ddim' noise: DDIMScheduler "
            "goes down by one step, which must divide the timesteps. Use --student.scale None, or another number of "
            "--student.steps (1, 2, 4, 5 or 8 of 1,000 timesteps)"
        )
    nearest = min(found, key=lambda times: times_gap(student.times or times, times))
    write = lambda times: " ".join(f"{t:.6g}" for t in times)
    inputs = lambda times: [round(float(n), 3) for n in schedule.native(torch.tensor(times, dtype=torch.float64))]
    raise ValueError(
        f"no diffusers scheduler of this family visits the times {write(student.times or ())} (network inputs "
        f"{inputs(student.times or ())}) with {student.renoise!r} noise. The nearest possible times are\n"
        f"  --student.times {write(nearest)}\n(network inputs {inputs(nearest)}). "
        f"Without --student.times: {write(found[0])}"
    )


def student_config_of_export(teacher: Teacher, given: StudentConfig) -> StudentConfig:
    """If the teacher is an exported student, `given` with that student's times, scale and noise; else `given`."""
    facts = fields.facts(teacher.parts.folder)
    if facts.get("student") is not True:
        return given
    found = teacher.parts.scheduler()
    steps = facts["steps"]
    unit = type(found).__name__ in ("LCMScheduler", "DDIMScheduler", "TCDScheduler")
    if type(found).__name__ == "EulerDiscreteScheduler":
        unit = found.config.timestep_spacing == "leading"
    return dataclasses.replace(
        given,
        steps=steps,
        sigma=None,
        timestep=None,
        scale=1.0 if unit else None,
        renoise=transition_of(found).name,
        times=pipeline_times(teacher, found, steps),
    )


def transition_of(scheduler: Scheduler) -> Transition:
    """The transition between two calls of an exported student's scheduler."""
    match type(scheduler).__name__:
        case "TCDScheduler":
            return TCD
        case "EulerAncestralDiscreteScheduler":
            return ANCESTRAL
        case "DDIMScheduler" | "EulerDiscreteScheduler":
            return DDIM
        case "FlowMatchEulerDiscreteScheduler" if not scheduler.config.stochastic_sampling:
            return DDIM
    return FRESH
