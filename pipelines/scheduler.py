"""The scheduler that an exported student runs under. It comes first: the student is trained on the times it returns.

A config carries the times, the scale of the input and what happens between two calls; nothing else does, so what no
config can say is refused before training. With a table of betas (all checked against the student's own sampler):

    fresh noise, unit input            LCMScheduler, original_inference_steps = steps DMD2, VSD, LCM
    ddim, input scaled by sigma        EulerDiscreteScheduler, trailing                       Lightning
    one call at n < N - 1              the same two on the first n + 1 betas     DMD2 at 399, SiD-LSG at 625
    flow                               FlowMatchEuler, stochastic_sampling where noise is fresh
    flow that is told its guidance     SCM, which reads it on TrigFlow                   SANA-Sprint
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import torch

from distill.roles import StudentConfig
from distill.schedule import EDM, VP, Flow
from pipelines import noise

if TYPE_CHECKING:
    from pipelines import Teacher

LCM = 50  # steps of the teacher that LCM's grid of times is made of


def scheduler(teacher: Teacher, student: StudentConfig) -> tuple[Any, tuple[float, ...]]:
    """(scheduler, times): a diffusers scheduler whose config carries the student, and the times it visits.

    A ValueError says what cannot be carried, and what can.
    """
    schedule = teacher.denoiser.schedule
    match schedule:
        case VP():
            return _table(teacher, schedule, student)
        case Flow() if teacher.parts.index["_class_name"] == "SanaSprintPipeline":
            return _trig(schedule, student)
        case Flow():
            return _flow(teacher, schedule, student)
        case EDM():
            return _edm(teacher, schedule, student)
    raise ValueError(f"no scheduler of diffusers carries a student on {type(schedule).__name__}")


def finished(teacher: Teacher, given: StudentConfig) -> StudentConfig:
    """`given`, called as the exported student that the teacher is: the inverse of `scheduler`. Else `given` itself.

    The folder's scheduler says how; times of a table are on that scheduler's own, which ends at the first call.
    """
    path = teacher.parts.folder / "distill.json"
    facts = json.loads(path.read_text()) if path.is_file() else {}
    if facts.get("student") is not True:
        return given
    found, steps = teacher.parts.scheduler(), facts["steps"]
    calls: dict[str, Any] = dict.fromkeys(("sigma", "timestep", "scale", "times")) | {"steps": steps}
    calls["renoise"] = "fresh"
    if isinstance(teacher.denoiser.schedule, VP):
        found.set_timesteps(steps)
        calls["times"] = tuple(
            (found.timesteps.double() / (len(teacher.denoiser.schedule.alphas_cumprod) - 1)).tolist()
        )
    match type(found).__name__:
        case "LCMScheduler":
            calls["scale"] = 1.0
        case "EulerDiscreteScheduler":
            calls["renoise"] = "ddim"
        case "FlowMatchEulerDiscreteScheduler" if not found.config.stochastic_sampling:
            calls["renoise"] = "ddim"
        case "CMStochasticIterativeScheduler":
            calls["sigma"] = found.config.sigma_max
    return dataclasses.replace(given, **calls)


def _table(teacher: Teacher, schedule: VP, student: StudentConfig) -> tuple[Any, tuple[float, ...]]:
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    last = len(schedule.alphas_cumprod) - 1
    n, own = round(student.first(schedule) * last), teacher.parts.scheduler()
    if n < last and student.steps > 1:
        raise ValueError(f"a student of {student.steps} steps starts at the end of the schedule; it is told {n}")
    common = {
        "num_train_timesteps": n + 1,
        **noise.betas(own, schedule, n),
        "steps_offset": 1,  # unused; SD's pipeline warns of another
        "prediction_type": {kind: name for name, kind in noise.KINDS.items()}[teacher.denoiser.kind],
    }
    sigma = float(schedule.coefficients(torch.tensor([n / last]).double())[1])
    unit = abs((student.scale or sigma) - 1) < 1e-4  # PixArt's table ends at .99998: as good as noise alone
    scaled = student.scale is None or abs(student.scale / sigma - 1) < 1e-4
    exact = student.steps > 1 or n < last or not noise.zero_terminal(own)  # LCM's end is 0, not the 2^-24 of Euler's
    if unit and exact and (student.renoise == "fresh" or student.steps == 1):
        grids = [LCMScheduler(**common, original_inference_steps=n, clip_sample=False) for n in (student.steps, LCM)]
    elif scaled and (student.renoise == "ddim" or student.steps == 1):
        grids = [EulerDiscreteScheduler(**common, timestep_spacing="trailing")]
    else:
        raise ValueError(
            f"no scheduler carries an input scale of {student.scale or sigma:.4g} with {student.renoise!r} noise: use "
            f"--student.scale 1 with --student.renoise fresh, or no scale ({sigma:.4g}) with --student.renoise ddim"
        )
    found = {}
    for made in grids[: 2 if n == last else 1]:
        made.set_timesteps(student.steps)
        found[tuple((made.timesteps.double() / last).tolist())] = made
    times = next((times for times in found if student.times is None or _close(student.times, times)), None)
    return found[times or _checked(student, next(iter(found)))], times


def _flow(teacher: Teacher, schedule: Flow, student: StudentConfig) -> tuple[Any, tuple[float, ...]]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    if student.scale is not None and abs(student.scale - 1) > 1e-6:
        raise ValueError(f"a flow's scheduler feeds unit noise, not noise scaled by {student.scale}")
    config = teacher.parts.scheduler().config
    start, steps = student.first(schedule), student.steps
    shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
    options: dict[str, Any] = {"num_train_timesteps": 1000, "shift": shift, "use_dynamic_shifting": False}
    end = shift / (steps + shift - 1)  # the level that the shift gives to 1 / steps
    if not hasattr(teacher.parts.family, "set_timesteps") and steps > 1:
        options["shift_terminal"] = end  # these pipelines ask for `steps` levels down to the last one of training
    if start < 1:
        raise ValueError(f"a flow's pipeline starts at noise alone; this student starts at t = {start:.4g}")
    found = FlowMatchEulerDiscreteScheduler(**options, stochastic_sampling=student.renoise == "fresh" and steps > 1)
    teacher.set_timesteps(found, steps)
    return found, _checked(student, tuple(found.sigmas[:-1].double().tolist()))


def _trig(schedule: Flow, student: StudentConfig) -> tuple[Any, tuple[float, ...]]:
    from diffusers import SCMScheduler

    from pipelines.sana import angles

    if student.scale is not None and abs(student.scale - 1) > 1e-6:
        raise ValueError(f"SANA-Sprint's pipeline feeds unit noise, not noise scaled by {student.scale}")
    if student.steps > 1 and student.renoise != "fresh":
        raise ValueError("SANA-Sprint's pipeline renoises with fresh noise: train with --student.renoise fresh")
    if student.first(schedule) < 1:
        raise ValueError("SANA-Sprint's pipeline starts at noise alone: leave --student.sigma and timestep out")
    angle = torch.tensor(angles(student.steps), dtype=torch.float64)
    times = angle.sin() / (angle.sin() + angle.cos())
    return SCMScheduler(), _checked(student, tuple(times.tolist()))


def _edm(teacher: Teacher, schedule: EDM, student: StudentConfig) -> tuple[Any, tuple[float, ...]]:
    from pipelines import edm

    if student.steps > 1 and student.renoise != "fresh":
        raise ValueError("this family's scheduler renoises with fresh noise: train with --student.renoise fresh")
    sigma = float(schedule.ratio(torch.tensor([student.first(schedule)]).double()))
    if student.scale is not None and abs(student.scale / sigma - 1) > 1e-4:
        raise ValueError(f"this family's scheduler scales its input by sigma {sigma:.4g}, not by {student.scale}")
    ratios = [sigma * (1 - i / student.steps) ** edm.RHO for i in range(student.steps)]
    times = tuple(schedule.time(torch.tensor(ratios).double()).tolist())
    return edm.scheduler(teacher.denoiser.sigma_d, sigma, student.steps), _checked(student, times)


def _close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


def _checked(student: StudentConfig, times: tuple[float, ...]) -> tuple[float, ...]:
    if student.times is not None and not _close(student.times, times):
        raise ValueError(
            f"the family's scheduler carries the times {times}, not {student.times}: leave --student.times out"
        )
    return times
