"""The scheduler that an exported student runs under. It comes first: the student is trained on the times it returns.

A config carries the times, the scale of the input and what happens between two calls; nothing else does, so what no
config can say is refused before training. With a table of betas (all checked against the student's own sampler):

    fresh noise, unit input            LCMScheduler, original_inference_steps = steps DMD2, VSD, LCM
    ddim, input scaled by sigma        EulerDiscreteScheduler, trailing                       Lightning
    one call at n < N - 1              the same two on the first n + 1 betas     DMD2 at 399, SiD-LSG at 625
    flow                               FlowMatchEuler, stochastic_sampling where noise is fresh
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from distill.roles import StudentConfig
from distill.schedule import EDM, VP, Flow

if TYPE_CHECKING:
    from pipelines import Teacher


def scheduler(teacher: Teacher, student: StudentConfig) -> tuple[Any, tuple[float, ...]]:
    """(scheduler, times): a diffusers scheduler whose config carries the student, and the times it visits.

    A ValueError says what cannot be carried, and what can.
    """
    schedule = teacher.denoiser.schedule
    match schedule:
        case VP():
            return _table(teacher, schedule, student)
        case Flow():
            return _flow(teacher, schedule, student)
        case EDM():
            return _edm(teacher, schedule, student)
    raise ValueError(f"no scheduler of diffusers carries a student on {type(schedule).__name__}")


def first(schedule: Any, student: StudentConfig) -> float:
    """The time of the student's first call."""
    one = torch.ones(1, dtype=torch.float64)
    if student.sigma is not None:
        return float(schedule.time(student.sigma * one))
    if student.timestep is not None and student.steps == 1:
        return student.timestep / float(schedule.native(one))
    return 1.0


def _table(teacher: Teacher, schedule: VP, student: StudentConfig) -> tuple[Any, tuple[float, ...]]:
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    config = teacher.parts.scheduler().config
    last = len(schedule.alphas_cumprod) - 1
    n = round(first(schedule, student) * last)
    if n < last and student.steps > 1:
        raise ValueError(f"a student of {student.steps} steps starts at the end of the schedule; it is told {n}")
    common = {
        "num_train_timesteps": n + 1,
        "beta_start": config.beta_start,
        "beta_end": _beta(config, n),
        "beta_schedule": config.beta_schedule,
        "prediction_type": config.prediction_type,
    }
    sigma = float(schedule.coefficients(torch.tensor([n / last]).double())[1])
    unit = student.scale is not None and abs(student.scale - 1) < 1e-6
    scaled = student.scale is None or abs(student.scale / sigma - 1) < 1e-4
    if unit and (student.renoise == "fresh" or student.steps == 1):
        found = LCMScheduler(**common, original_inference_steps=student.steps, clip_sample=False)
    elif scaled and (student.renoise == "ddim" or student.steps == 1):
        found = EulerDiscreteScheduler(**common, timestep_spacing="trailing")
    else:
        raise ValueError(
            f"no scheduler carries an input scale of {student.scale or sigma:.4g} with {student.renoise!r} noise: use "
            f"--student.scale 1 with --student.renoise fresh, or no scale ({sigma:.4g}) with --student.renoise ddim"
        )
    found.set_timesteps(student.steps)
    return found, _checked(student, tuple((found.timesteps.double() / last).tolist()))


def _beta(config: Any, n: int) -> float:
    """beta_n of a table: the end of the table cut after n."""
    power = {"linear": 1.0, "scaled_linear": 0.5}.get(config.beta_schedule)
    if power is None or config.get("trained_betas") is not None:
        raise ValueError(
            f"a table of betas of kind {config.beta_schedule!r} is not known; linear and scaled_linear are"
        )
    low, high = config.beta_start**power, config.beta_end**power
    return (low + (high - low) * n / (config.num_train_timesteps - 1)) ** (1 / power)


def _flow(teacher: Teacher, schedule: Flow, student: StudentConfig) -> tuple[Any, tuple[float, ...]]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    if student.scale is not None and abs(student.scale - 1) > 1e-6:
        raise ValueError(f"a flow's scheduler feeds unit noise, not noise scaled by {student.scale}")
    config = teacher.parts.scheduler().config
    start, steps = first(schedule, student), student.steps
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


def _edm(teacher: Teacher, schedule: EDM, student: StudentConfig) -> tuple[Any, tuple[float, ...]]:
    from pipelines import edm

    if student.steps > 1 and student.renoise != "fresh":
        raise ValueError("this family's scheduler renoises with fresh noise: train with --student.renoise fresh")
    sigma = float(schedule.ratio(torch.tensor([first(schedule, student)]).double()))
    if student.scale is not None and abs(student.scale / sigma - 1) > 1e-4:
        raise ValueError(f"this family's scheduler scales its input by sigma {sigma:.4g}, not by {student.scale}")
    ratios = [sigma * (1 - i / student.steps) ** edm.RHO for i in range(student.steps)]
    times = tuple(schedule.time(torch.tensor(ratios).double()).tolist())
    return edm.scheduler(teacher.denoiser.sigma_d, sigma, student.steps), _checked(student, times)


def _checked(student: StudentConfig, times: tuple[float, ...]) -> tuple[float, ...]:
    asked = student.times
    if asked is not None and (len(asked) != len(times) or max(abs(a - b) for a, b in zip(asked, times)) > 1e-4):
        raise ValueError(f"the family's scheduler carries the times {times}, not {asked}: leave --student.times out")
    return times
