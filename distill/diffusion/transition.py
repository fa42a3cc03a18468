"""The transition of x from one call of a student to the next: with new noise, or with the predicted noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Renoise = Literal["fresh", "ddim", "tcd"]  # the values of --student.renoise


@dataclass(frozen=True)
class Transition:
    """x_s = alpha_s x0 + sigma_s eps, from a call at t to the time s of the next call."""

    name: Renoise
    adds_noise: bool  # eps is new noise (DMD2, consistency); else the predicted noise
    ends_at_data: bool  # the last call gives x0; else x at the level of t = 0 (PCM, TCD)
    takes_end_time: bool  # a network with a second time input (end_time.py) gets s


FRESH = Transition("fresh", adds_noise=True, ends_at_data=True, takes_end_time=False)
DDIM = Transition("ddim", adds_noise=False, ends_at_data=True, takes_end_time=True)
TCD = Transition("tcd", adds_noise=False, ends_at_data=False, takes_end_time=False)
TRANSITIONS = {transition.name: transition for transition in (FRESH, DDIM, TCD)}


def find_transition(name: str) -> Transition:
    """The transition for a value of --student.renoise. ValueError for another value."""
    for transition in TRANSITIONS.values():
        if transition.name == name:
            return transition
    raise ValueError(f"renoise is {name!r}; it must be one of {tuple(TRANSITIONS)}")
