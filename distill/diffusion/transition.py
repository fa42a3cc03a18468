"""The transition of x from one call of a student to the next: with new noise, with the predicted noise, or both.

A transition is made in Student.step and Student.calls. The scheduler that carries it is in
pipelines/families/student_schedulers.py, and pipelines/export/schedule.py reads it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Renoise = Literal["fresh", "ddim", "tcd", "ancestral"]  # the values of --student.renoise


@dataclass(frozen=True)
class Transition:
    """x_s = alpha_s x0 + sigma_s eps, from a call at t to the time s of the next call."""

    name: Renoise
    adds_noise: bool  # eps is new noise (DMD2, consistency), in whole or in part; else the predicted noise
    ends_at_data: bool  # the last call gives x0; else x at the level of t = 0 (PCM, TCD)
    takes_end_time: bool  # a network with a second time input (end_time.py) gets s
    keeps_noise: bool = False  # eps = rho predicted + sqrt(1 - rho^2) new, with rho = ratio(s) / ratio(t) (DDPM)


FRESH = Transition("fresh", adds_noise=True, ends_at_data=True, takes_end_time=False)
DDIM = Transition("ddim", adds_noise=False, ends_at_data=True, takes_end_time=True)
TCD = Transition("tcd", adds_noise=False, ends_at_data=False, takes_end_time=False)
ANCESTRAL = Transition("ancestral", adds_noise=True, ends_at_data=True, takes_end_time=False, keeps_noise=True)
TRANSITIONS = {transition.name: transition for transition in (FRESH, DDIM, TCD, ANCESTRAL)}


def find_transition(name: str) -> Transition:
    """The transition for a value of --student.renoise. ValueError for another value."""
    for transition in TRANSITIONS.values():
        if transition.name == name:
            return transition
    raise ValueError(f"renoise is {name!r}; it must be one of {tuple(TRANSITIONS)}")
