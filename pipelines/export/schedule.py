"""The scheduler that an exported student runs under. It comes first: the student is trained on the times it returns.

A config carries the times, the scale of the input and what happens between two calls; nothing else does, so what no
config can say is refused before training. Times that are given are looked for in every config that a family can use:

    table, fresh noise, unit input     LCMScheduler: every grid of original_inference_steps   DMD2, VSD, LCM
    table, "tcd", unit input           TCDScheduler without new noise, on the same grids      PCM, TCD
    table, "ddim", input times sigma   EulerDiscreteScheduler: trailing; two times of any kind by sigma_min, sigma_max
    table, "ddim", unit input          DDIMScheduler: trailing; Euler's two times             SUN
    flow                               FlowMatchEuler: shift and shift_terminal; stochastic_sampling for fresh noise
    flow that is told its guidance     SCM, which reads it on TrigFlow                        SANA-Sprint
    EDM                                CMStochasticIterative: rho and num_train_timesteps

A table is cut after the first call where that is below its end (DMD2 at 399, SiD-LSG at 625). Two calls may be
anywhere, three anywhere on a flow; of more, those that the parameters of a config reach.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from distill.diffusion.schedule import EDM, VP, Flow
from distill.training.config import StudentConfig
from pipelines import fields
from pipelines.families import schedulers

if TYPE_CHECKING:
    from pipelines.teacher import Teacher

LCM = 50  # steps of the teacher that LCM's grid of times is made of
Times = tuple[float, ...]


def scheduler(teacher: Teacher, student: StudentConfig) -> tuple[Any, Times]:
    """(scheduler, times): a diffusers scheduler whose config carries the student, and the times it visits.

    A ValueError says what cannot be carried, and what can.
    """
    schedule = teacher.denoiser.schedule
    if student.times and (student.sigma or student.timestep) and abs(student.first(schedule) - student.times[0]) > 1e-4:
        raise ValueError(
            f"student.times begin at {student.times[0]:.6g}, and student.sigma or timestep puts the first call at "
            f"{student.first(schedule):.6g}: pass --student.sigma None --student.timestep None"
        )
    match schedule:
        case VP():
            made = _tables(teacher, schedule, student)
        case Flow() if teacher.parts.index["_class_name"] == "SanaSprintPipeline":
            made = _trig(schedule, student)
        case Flow():
            made = _flows(teacher, schedule, student)
        case EDM():
            made = _edm(teacher, schedule, student)
        case _:
            raise ValueError(f"no diffusers scheduler supports a student on {type(schedule).__name__}")
    found: list[Times] = []
    for candidate in made:
        times = pipeline_times(teacher, candidate, student.steps)
        if student.times is None or _gap(student.times, times) < 1e-4:
            return candidate, times
        found.append(times)
    if not found:
        raise ValueError(
            f"no diffusers scheduler supports {student.steps} calls of unit noise with 'ddim' noise: DDIMScheduler "
            "goes down by one step, which must divide the timesteps. Use --student.scale None, or another number of "
            "--student.steps (1, 2, 4, 5 or 8 of 1,000 timesteps)"
        )
    nearest = min(found, key=lambda times: _gap(student.times or times, times))
    write = lambda times: " ".join(f"{t:.6g}" for t in times)
    inputs = lambda times: [round(float(n), 3) for n in schedule.native(torch.tensor(times, dtype=torch.float64))]
    raise ValueError(
        f"no diffusers scheduler of this family visits the times {write(student.times or ())} (network inputs "
        f"{inputs(student.times or ())}) with {student.renoise!r} noise. The nearest possible times are\n"
        f"  --student.times {write(nearest)}\n(network inputs {inputs(nearest)}). "
        f"Without --student.times: {write(found[0])}"
    )


def pipeline_times(teacher: Teacher, scheduler: Any, steps: int) -> Times:
    """The times of the teacher's schedule at which its pipeline calls the network under `scheduler`."""
    schedule = teacher.denoiser.schedule
    if type(scheduler).__name__ == "SCMScheduler":
        from pipelines.families.sana import angles

        angle = torch.tensor(angles(steps), dtype=torch.float64)
        return tuple((angle.sin() / (angle.sin() + angle.cos())).tolist())
    teacher.set_timesteps(scheduler, steps)
    match schedule:
        case VP():
            t = scheduler.timesteps.double() / (len(schedule.alphas_cumprod) - 1)
        case EDM():
            t = schedule.time((scheduler.timesteps.double() / 250).exp())  # CM pipelines use 250 ln sigma
            t = torch.where((t - 1).abs() < 1e-9, 1.0, t)
        case _:
            t = scheduler.sigmas[: len(scheduler.timesteps)].double()
    return tuple(t.tolist())


def finished(teacher: Teacher, given: StudentConfig) -> StudentConfig:
    """If the teacher is an exported student, `given` with that student's times, scale and noise; else `given`."""
    facts = fields.facts(teacher.parts.folder)
    if facts.get("student") is not True:
        return given
    found, steps = teacher.parts.scheduler(), facts["steps"]
    calls: dict[str, Any] = dict.fromkeys(("sigma", "timestep", "scale")) | {"steps": steps, "renoise": "fresh"}
    calls["times"] = pipeline_times(teacher, found, steps)
    match type(found).__name__:
        case "LCMScheduler" | "DDIMScheduler" | "TCDScheduler":
            calls["scale"] = 1.0
        case "EulerDiscreteScheduler" if found.config.timestep_spacing == "leading":
            calls["scale"] = 1.0
    match type(found).__name__:
        case "TCDScheduler":
            calls["renoise"] = "tcd"
        case "DDIMScheduler" | "EulerDiscreteScheduler":
            calls["renoise"] = "ddim"
        case "FlowMatchEulerDiscreteScheduler" if not found.config.stochastic_sampling:
            calls["renoise"] = "ddim"
    return dataclasses.replace(given, **calls)


def _tables(teacher: Teacher, schedule: VP, student: StudentConfig) -> Iterator[Any]:
    """Schedulers of a table, cut after the first call."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler

    last = len(schedule.alphas_cumprod) - 1
    first = student.times[0] if student.times else student.first(schedule)
    n, steps = round(first * last), student.steps
    sigma = float(schedule.coefficients(torch.tensor([first]).double())[1])
    unit = abs((student.scale or sigma) - 1) < 1e-4  # PixArt's table ends at .99998: as good as noise alone
    scaled = student.scale is None or abs(student.scale / sigma - 1) < 1e-4
    exact = (
        steps > 1 or n < last or not schedulers.zero_terminal(teacher.parts.scheduler())
    )  # LCM's end is 0, Euler's 2^-24
    if student.renoise == "tcd" and unit:
        yield from _grids(teacher, TCDScheduler, n, last, student)
    elif student.renoise != "tcd" and unit and exact and (student.renoise == "fresh" or steps == 1):
        yield from _grids(teacher, LCMScheduler, n, last, student)
    elif student.renoise != "tcd" and (unit or scaled) and (student.renoise == "ddim" or steps == 1):
        if scaled:
            yield EulerDiscreteScheduler(**_table(teacher, n), timestep_spacing="trailing")
        elif (n + 1) % steps == 0:  # its step goes down by as much each time
            yield DDIMScheduler(**_table(teacher, n), timestep_spacing="trailing", clip_sample=False)
        if not student.times:
            return
        ratios = schedule.ratio(torch.tensor([student.times[-1], first]).double()).tolist()
        ends = dict(zip(("sigma_min", "sigma_max"), ratios, strict=True))
        for kind in ("karras", "exponential", "beta") if steps > 1 else ():
            spacing = "trailing" if scaled else "leading"  # it decides the scale of the first input
            options = {f"use_{kind}_sigmas": True, "timestep_spacing": spacing, **ends}
            yield EulerDiscreteScheduler(**_table(teacher, last), **options)
    else:
        raise ValueError(
            f"no scheduler supports an input scale of {student.scale or sigma:.4g} with {student.renoise!r} noise: use "
            f"--student.scale 1 with --student.renoise fresh or tcd, or no scale ({sigma:.4g}) with --student.renoise "
            "ddim"
        )


def _table(teacher: Teacher, n: int) -> dict[str, Any]:
    """Options of a scheduler of the teacher's table, cut after its timestep n."""
    schedule: Any = teacher.denoiser.schedule
    return {
        "num_train_timesteps": n + 1,
        **schedulers.betas(teacher.parts.scheduler(), schedule, n),
        "steps_offset": 1,  # unused; SD's pipeline warns of another
        "prediction_type": {kind: name for name, kind in schedulers.KINDS.items()}[teacher.denoiser.kind],
    }


def _grids(teacher: Teacher, kind: Any, n: int, last: int, student: StudentConfig) -> Iterator[Any]:
    """LCM's or TCD's schedulers that start at n: they take `steps` points of a grid of K, each n + 1 over K apart."""
    steps, options = student.steps, _table(teacher, n) | {"clip_sample": False}
    whole = [K for K in range(steps, n + 2) if (n + 1) % K == 0]
    if n == last:
        whole = [steps, *(K for K in (LCM,) if K > steps), *whole]
    for K in whole if student.times else whole[:1]:
        yield kind(**options, original_inference_steps=K)


def _flows(teacher: Teacher, schedule: Flow, student: StudentConfig) -> Iterator[Any]:
    """Flows' schedulers: the teacher's own shift first, then those that come nearest to the times that are given."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if student.scale is not None and abs(student.scale - 1) > 1e-6:
        raise ValueError(f"a flow's scheduler feeds unit noise, not noise scaled by {student.scale}")
    config, steps, times = teacher.parts.scheduler().config, student.steps, student.times
    if (start := times[0] if times else student.first(schedule)) < 1:
        raise ValueError(f"a flow's pipeline starts at noise alone; this student starts at t = {start:.4g}")
    shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
    options: dict[str, Any] = {"num_train_timesteps": 1000, "use_dynamic_shifting": False}
    options["stochastic_sampling"] = student.renoise == "fresh" and steps > 1

    def make(shift: float, end: float | None, **more: bool) -> Any:
        return FlowMatchEulerDiscreteScheduler(**options, shift=shift, shift_terminal=end, **more)

    end = shift / (steps + shift - 1)  # the level that the shift gives to 1 / steps
    own = hasattr(teacher.parts.family, "set_timesteps")  # others ask for levels down to the last one of training
    yield make(shift, None if own or steps == 1 else end)
    if not times or steps == 1:
        return
    from scipy.optimize import minimize_scalar

    gap = lambda log: _gap(times, pipeline_times(teacher, make(math.exp(log), times[-1]), steps))
    best = minimize_scalar(gap, bounds=(-7, 7), method="bounded", options={"xatol": 1e-9}).x if steps > 2 else 0.0
    yield make(math.exp(best), times[-1])
    for kind in ("karras", "exponential", "beta"):
        yield make(shift, times[-1], **{f"use_{kind}_sigmas": True})


def _trig(schedule: Flow, student: StudentConfig) -> Iterator[Any]:
    from diffusers import SCMScheduler

    if student.scale is not None and abs(student.scale - 1) > 1e-6:
        raise ValueError(f"SANA-Sprint's pipeline feeds unit noise, not noise scaled by {student.scale}")
    if student.steps > 1 and student.renoise != "fresh":
        raise ValueError("SANA-Sprint's pipeline renoises with fresh noise: train with --student.renoise fresh")
    if student.first(schedule) < 1:
        raise ValueError("SANA-Sprint's pipeline starts at noise alone: leave --student.sigma and timestep out")
    yield SCMScheduler()


def _edm(teacher: Teacher, schedule: EDM, student: StudentConfig) -> Iterator[Any]:
    """Levels sigma (1 - v i)^rho, i = 0, 1, ...: v is a fraction near 1 / steps, and that by default."""
    from pipelines.families import edm

    steps, times = student.steps, student.times
    if student.renoise == "tcd" or (steps > 1 and student.renoise != "fresh"):
        raise ValueError(
            "this family's scheduler renoises with fresh noise: train with --student.renoise fresh, or, where a method "
            "needs another, a student of one call (--student.steps 1 --student.renoise fresh)"
        )
    start = times[0] if times else student.first(schedule)
    ratios = schedule.ratio(torch.tensor(times or [start]).double()).tolist()
    sigma = ratios[0]
    if student.scale is not None and abs(student.scale / sigma - 1) > 1e-4:
        raise ValueError(f"this family's scheduler scales its input by sigma {sigma:.4g}, not by {student.scale}")
    make = lambda points, rho=edm.RHO: edm.scheduler(teacher.denoiser.sigma_d, sigma, points, rho)
    points = steps + 1
    if sigma / steps**edm.RHO < schedule.sigma_min:  # the last call would be below the schedule
        even = float(schedule.ratio(torch.tensor([start / steps]).double()))  # of times that fall uniformly
        last = lambda points: edm.RHO * math.log(1 - (steps - 1) / (points - 1))
        points = min(range(steps + 1, 2 * steps), key=lambda points: abs(last(points) - math.log(even / sigma)))
    yield make(points)
    for r in range(1, 65) if times and steps > 1 else ():
        for points in range(r * steps, (r + 1) * steps):
            rest = 1 - (steps - 1) * r / (points - 1)
            rho = math.log(ratios[-1] / sigma) / math.log(rest) if rest > 1e-9 else 0.0
            if abs(math.log(sigma)) < 600 * rho:  # the scheduler takes the root of rho
                yield make(points, rho)


def _gap(a: Times, b: Times) -> float:
    """The largest difference of two students' times; infinite where they are not equally many."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) if len(a) == len(b) else math.inf
