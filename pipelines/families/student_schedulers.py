"""Schedulers of diffusers whose config carries a student, for tables of betas and for flows. Families share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from distill.diffusion.schedule import EDM, VP
from distill.training.config import StudentConfig
from pipelines.families import schedulers
from pipelines.families.base import Teacher
from pipelines.protocols import Scheduler

LCM = 50  # steps of the teacher in LCM's grid of times
Times = tuple[float, ...]


def pipeline_times(teacher: Teacher, scheduler: Scheduler, steps: int) -> Times:
    """The times of the teacher's schedule at which its pipeline calls the network with `scheduler`."""
    schedule = teacher.denoiser.schedule
    times = teacher.family.call_times(scheduler, steps)
    if times is not None:
        return times
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


@dataclass(frozen=True)
class Start:
    """The first call of a student of a table.

    t, n: its time and its timestep. last: the table's last timestep. sigma: the noise's standard deviation.
    unit, scaled: whether the input is noise of deviation 1, and whether it is noise of deviation sigma.
    """

    t: float
    n: int
    last: int
    sigma: float
    unit: bool
    scaled: bool


def find_start(schedule: VP, student: StudentConfig) -> Start:
    """Where the student's first call stands in the table."""
    last = len(schedule.alphas_cumprod) - 1
    t = student.times[0] if student.times else student.first_time(schedule)
    sigma = float(schedule.coefficients(torch.tensor([t]).double())[1])
    unit = abs((student.scale or sigma) - 1) < 1e-4  # PixArt's table ends at .99998, which is almost pure noise
    scaled = student.scale is None or abs(student.scale / sigma - 1) < 1e-4
    return Start(t, round(t * last), last, sigma, unit, scaled)


def of_table(teacher: Teacher, student: StudentConfig) -> Iterator[Scheduler]:
    """Schedulers of a table, cut after the first call."""
    start = find_start(table_of(teacher), student)
    ancestral = student.transition.keeps_noise and student.steps > 1
    return _ancestral(teacher, start, student) if ancestral else _common(teacher, start, student)


def _ancestral(teacher: Teacher, start: Start, student: StudentConfig) -> Iterator[Scheduler]:
    """Euler's ancestral scheduler, which adds a part of the noise anew."""
    from diffusers import EulerAncestralDiscreteScheduler

    if not start.scaled:
        raise ValueError(
            f"a scheduler of 'ancestral' noise scales its input by {start.sigma:.4g}, not by {student.scale}: use "
            "--student.scale None"
        )
    yield EulerAncestralDiscreteScheduler(**_table(teacher, start.n), timestep_spacing="trailing")


def _common(teacher: Teacher, start: Start, student: StudentConfig) -> Iterator[Scheduler]:
    """The schedulers of all other students."""
    from diffusers import LCMScheduler, TCDScheduler

    transition = student.transition
    one = student.steps == 1
    # LCM's last alpha_bar is 0, Euler's 2^-24
    exact = not one or start.n < start.last or not schedulers.zero_terminal(teacher.parts.scheduler())
    if start.unit and not transition.ends_at_data:
        yield from _grids(teacher, TCDScheduler, start, student)
    elif start.unit and exact and (one or transition.adds_noise):
        yield from _grids(teacher, LCMScheduler, start, student)
    elif (start.unit or start.scaled) and transition.ends_at_data and (one or not transition.adds_noise):
        yield from _solvers(teacher, start, student)
    else:
        raise ValueError(
            f"no scheduler supports an input scale of {student.scale or start.sigma:.4g} with {student.renoise!r} "
            "noise: use --student.scale 1 with --student.renoise fresh or tcd, or no scale "
            f"({start.sigma:.4g}) with --student.renoise ddim or ancestral"
        )


def _solvers(teacher: Teacher, start: Start, student: StudentConfig) -> Iterator[Scheduler]:
    """Euler's and DDIM's schedulers, which add no noise between the calls."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    if start.scaled:
        yield EulerDiscreteScheduler(**_table(teacher, start.n), timestep_spacing="trailing")
    elif (start.n + 1) % student.steps == 0:  # its step is the same each time
        yield DDIMScheduler(**_table(teacher, start.n), timestep_spacing="trailing", clip_sample=False)
    if not student.times or student.steps == 1:
        return
    ratios = table_of(teacher).ratio(torch.tensor([student.times[-1], start.t]).double()).tolist()
    ends = dict(zip(("sigma_min", "sigma_max"), ratios, strict=True))
    spacing = "trailing" if start.scaled else "leading"  # it determines the scale of the first input
    for kind in ("karras", "exponential", "beta"):
        options = {f"use_{kind}_sigmas": True, "timestep_spacing": spacing, **ends}
        yield EulerDiscreteScheduler(**_table(teacher, start.last), **options)


def table_of(teacher: Teacher) -> VP:
    """The teacher's table of noise."""
    schedule = teacher.denoiser.schedule
    assert isinstance(schedule, VP)
    return schedule


def _table(teacher: Teacher, n: int) -> dict[str, object]:
    """Options of a scheduler with the teacher's table, cut after its timestep n."""
    return {
        "num_train_timesteps": n + 1,
        **schedulers.betas(teacher.parts.scheduler(), table_of(teacher), n),
        "steps_offset": 1,  # unused; SD's pipeline warns about other values
        "prediction_type": {kind: name for name, kind in schedulers.KINDS.items()}[teacher.denoiser.kind],
    }


def _grids(
    teacher: Teacher, kind: Callable[..., Scheduler], start: Start, student: StudentConfig
) -> Iterator[Scheduler]:
    """LCM's or TCD's schedulers that start at n. They take `steps` points from a grid of K with spacing (n + 1) / K."""
    steps = student.steps
    levels = start.n + 1
    options = _table(teacher, start.n) | {"clip_sample": False}
    whole = [K for K in range(steps, levels + 1) if levels % K == 0]
    if start.n == start.last:
        whole = [steps, *(K for K in (LCM,) if K > steps), *whole]
    for K in whole if student.times else whole[:1]:
        yield kind(**options, original_inference_steps=K)


def check_flow_student(student: StudentConfig) -> None:
    """ValueError for an input scale or a noise between calls that no scheduler of flows has."""
    if student.scale is not None and abs(student.scale - 1) > 1e-6:
        raise ValueError(f"a flow's scheduler feeds unit noise, not noise scaled by {student.scale}")
    if student.transition.keeps_noise and student.steps > 1:
        raise ValueError("no flow's scheduler makes ancestral steps: train with --student.renoise fresh or ddim")


def of_flow(teacher: Teacher, student: StudentConfig) -> Iterator[Scheduler]:
    """Schedulers of flows: first the teacher's own shift, then those closest to the given times."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    check_flow_student(student)
    config = teacher.parts.scheduler().config
    steps = student.steps
    times = student.times
    if (start := times[0] if times else student.first_time(teacher.denoiser.schedule)) < 1:
        raise ValueError(f"a flow's pipeline starts at noise alone; this student starts at t = {start:.4g}")
    shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
    options: dict[str, object] = {"num_train_timesteps": 1000, "use_dynamic_shifting": False}
    options["stochastic_sampling"] = student.transition.adds_noise and steps > 1

    def make(shift: float, end: float | None, **more: bool) -> Scheduler:
        return FlowMatchEulerDiscreteScheduler(**options, shift=shift, shift_terminal=end, **more)

    end = shift / (steps + shift - 1)  # the level to which the shift maps 1 / steps
    own = teacher.family.set_timesteps is not None  # others ask for levels down to the last training level
    yield make(shift, None if own or steps == 1 else end)
    if not times or steps == 1:
        return
    from scipy.optimize import minimize_scalar

    gap = lambda log: times_gap(times, pipeline_times(teacher, make(math.exp(log), times[-1]), steps))
    best = minimize_scalar(gap, bounds=(-7, 7), method="bounded", options={"xatol": 1e-9}).x if steps > 2 else 0.0
    yield make(math.exp(best), times[-1])
    for kind in ("karras", "exponential", "beta"):
        yield make(shift, times[-1], **{f"use_{kind}_sigmas": True})


def times_gap(a: Times, b: Times) -> float:
    """The largest difference between two students' times; infinite if their numbers differ."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) if len(a) == len(b) else math.inf
