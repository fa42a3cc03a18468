"""What a method requires of the networks, with one check for each requirement."""

from __future__ import annotations

from collections.abc import Callable

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.end_time import time_embedding
from distill.method import Method, Requirement
from distill.networks.negative_attention import TEXT, layers
from distill.training.config import StudentConfig

Check = Callable[[Method, Denoiser, Condition, StudentConfig], object]
FROM_DATA = {Requirement.REAL, Requirement.PAIRS, Requirement.FORGOTTEN_PROMPTS}  # checked by data.check(requirements)
FROM_RECIPE = {  # pipelines/run.py loads the teacher accordingly, or attaches them to the networks
    Requirement.GUIDANCE_EMBEDDING,
    Requirement.EXPORTED_TEACHER,
    Requirement.PERCEPTUAL_DISTANCE,
    Requirement.REWARD,
    Requirement.CONTROL_PICTURE,
}


def check_requirements(method: Method, teacher: Denoiser, c: Condition, student: StudentConfig) -> None:
    """ValueError if the teacher, its example condition c or the student's calls lack something that the method
    requires."""
    for requirement in method.requirements:
        if requirement in CHECKS:
            CHECKS[requirement](method, teacher, c, student)
        elif requirement not in FROM_DATA | FROM_RECIPE:
            known = ", ".join(f"{one}" for one in Requirement)
            raise ValueError(
                f"{type(method).__name__}.requirements holds {requirement!r}; it may hold members of "
                f"distill.method.Requirement: {known}"
            )


def _null_condition(method: Method, teacher: Denoiser, c: Condition, student: StudentConfig) -> None:
    if teacher.null is None:
        raise ValueError(
            f"{type(method).__name__} with these guidance values needs a null condition, but the teacher is "
            "unconditional or was trained without label dropout; set its guidance (or every kappa) to 1"
        )


def _end_time(method: Method, teacher: Denoiser, c: Condition, student: StudentConfig) -> None:
    time_embedding(teacher.net)


def _cross_attention(method: Method, teacher: Denoiser, c: Condition, student: StudentConfig) -> None:
    layers(teacher.net)


def _negative_adapter(method: Method, teacher: Denoiser, c: Condition, student: StudentConfig) -> None:
    words = c[TEXT[0]].shape[1] if c is not None and TEXT[0] in c else 0
    if student.negative != words or not words:
        remedy = f"pass --student.negative {words}" if words else "it needs a teacher with text conditions"
        raise ValueError(
            f"{type(method).__name__} trains an adapter that hears a negative prompt after the {words} words of "
            f"the prompt, and student.negative is {student.negative}: {remedy}"
        )


def _several_calls(method: Method, teacher: Denoiser, c: Condition, student: StudentConfig) -> None:
    if student.steps < 2 or not student.transition.adds_noise:
        raise ValueError(
            f"{type(method).__name__} tunes the random calls of a student, all but the last; one of {student.steps} "
            f"call(s) with {student.renoise!r} noise between them has none: it needs two calls or more, with fresh "
            "noise"
        )


CHECKS: dict[Requirement, Check] = {
    Requirement.NULL_CONDITION: _null_condition,
    Requirement.END_TIME: _end_time,
    Requirement.CROSS_ATTENTION: _cross_attention,
    Requirement.NEGATIVE_ADAPTER: _negative_adapter,
    Requirement.SEVERAL_CALLS: _several_calls,
}
