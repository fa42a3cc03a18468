"""The student: a denoiser that is called at a few times, from noise to a sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.end_time import with_end_time
from distill.diffusion.schedule import VP, expand
from distill.diffusion.solver import Call, ancestral_shares, ancestral_step, ddim, renoising_step
from distill.diffusion.transition import FRESH, Renoise, Transition, find_transition
from distill.random import Draw


@dataclass(eq=False)
class Student:
    """G(z, c): x <- scale z; at each time x0 = denoiser(x, t, c).x0, then x moves to the next time.

    times    from noisy to clean, in (0, 1]; one time is a one-step student.
    scale    of the unit noise z at the first call; None is sigma(times[0]) (DMD2's latents: 1).
    renoise  the name of the transition between calls (transition.py).
    jumps    for a network with two times (end_time.py): without new noise, each call gets the time of the next call.
    phases   number of equal phases of the calls; `denoiser` makes those after the phases of `experts`.
    experts  frozen denoisers, one for each of the first phases (Phased DMD).
    """

    denoiser: Denoiser
    times: tuple[float, ...] = (1.0,)
    scale: float | None = None
    renoise: Renoise = "fresh"
    phases: int = 1
    experts: tuple[Denoiser, ...] = ()
    jumps: bool = False

    def __post_init__(self) -> None:
        self.times = tuple(float(t) for t in self.times)
        validate_times(self.times)
        find_transition(self.renoise)
        if len(self.times) % self.phases or len(self.experts) >= self.phases:
            raise ValueError(
                f"{len(self.times)} calls in {self.phases} phases with {len(self.experts)} experts of earlier ones; "
                "the phases have equally many calls, and at most all but one an expert"
            )

    @property
    def transition(self) -> Transition:
        return find_transition(self.renoise)

    def with_network(self, net: nn.Module) -> Student:
        """The same student with other weights, for example its moving average."""
        return replace(self, denoiser=replace(self.denoiser, net=net))

    @property
    def first_noise_ratio(self) -> float | None:
        """sigma / alpha at the first call. None: the first call is at the end of the schedule."""
        t = torch.tensor([self.times[0]], dtype=torch.float64)
        return None if self.times[0] == 1 else float(self.denoiser.path.ratio(t))

    @property
    def input_scale(self) -> float:
        if self.scale is not None:
            return self.scale
        return float(self.denoiser.path.coefficients(torch.tensor([self.times[0]], dtype=torch.float64))[1])

    @property
    def phase(self) -> tuple[int, int]:
        """(first call, call after the last) of the phase after those of `experts`."""
        n = len(self.times) // self.phases
        return n * len(self.experts), n * (len(self.experts) + 1)

    @property
    def phase_end_time(self) -> float | None:
        """The time of the first call after that phase. None: the phase ends at x0."""
        last = self.phase[1]
        return self.times[last] if last < len(self.times) else None

    @property
    def legs(self) -> list[tuple[float, float]]:
        """(time, end time) of each call; the end time is 0 if the student does not take one."""
        told = self.jumps and self.transition.takes_end_time
        return [(t, s if told else 0.0) for t, s in zip(self.times, (*self.times[1:], 0.0), strict=True)]

    def denoiser_of_call(self, i: int, to: float = 0.0) -> Denoiser:
        """The denoiser of call i. It gets the end time `to` if it takes one."""
        first, last = self.phase
        denoiser = self.experts[i // (last - first)] if i < first else self.denoiser
        return with_end_time(denoiser, to) if to and self.jumps and self.transition.takes_end_time else denoiser

    def generate(
        self, z: Tensor, c: Condition, draw: Draw | None = None, steps: int | None = None, to: float | None = None
    ) -> Tensor:
        """x0 [B, ...] after `steps` calls (default: all) from unit noise z. Gradient flows only through the last call.

        Noise between calls is draw.normal("renoise0"), "renoise1", ... to: return x at this time instead of x0.
        """
        steps = len(self.times) if steps is None else steps
        if not 1 <= steps <= len(self.times):
            raise ValueError(f"steps is {steps}; this student has {len(self.times)} time(s), so 1 to {len(self.times)}")
        x = self.input_scale * z
        known = draw.before if draw is not None and self.transition is FRESH else None  # x0 of the last call but one
        for i in range(0 if known is None else max(0, steps - 2), steps - 1):
            with torch.no_grad():
                moments = self.step(x, i, c) if known is None else self._moments(known, self.times[i + 1])
                x = self._sample(*moments, i, draw)
        mean, std = self.step(x, steps - 1, c, to or 0.0)
        return mean if to is None else self._sample(mean, std, steps - 1, draw)

    def calls(self, draw: Draw | None = None) -> list[Call]:
        """The calls as a list, so that several networks can share them. `run_calls` runs them as `generate` does.

        ValueError for a transition that does not end at x0.
        """
        if not self.transition.ends_at_data:
            raise ValueError("a student with 'tcd' noise ends at the level of t = 0, and turns of networks end at x0")
        between = ancestral_step if self.transition.keeps_noise else renoising_step
        anew = lambda i: between(lambda x: self._noise(i, x, draw))
        step = lambda i: anew(i) if self.transition.adds_noise else ddim
        return [Call(self.denoiser_of_call(i, to), t, step(i), self.scale) for i, (t, to) in enumerate(self.legs)]

    def trajectory(self, z: Tensor, c: Condition, draw: Draw | None = None) -> list[Tensor]:
        """The x [B, ...] of every call from unit noise z, then the sample x0. Random numbers as in `generate`."""
        walk = [self.input_scale * z]
        last = len(self.times) - 1
        for i in range(last):
            walk.append(self._sample(*self.step(walk[i], i, c), i, draw))
        return [*walk, self.step(walk[last], last, c)[0]]

    def step(self, x: Tensor, i: int, c: Condition, to: float | None = None) -> tuple[Tensor, Tensor]:
        """Mean [B, ...] and standard deviation [B, 1, ...] of the normal distribution of x after call i.

        to: time of that x, 0 for x0. None: the time of the next call, 0 after the last call. The standard deviation is
        0 without new noise.
        """
        to = (*self.times, 0.0)[i + 1] if to is None else to
        pred = self.denoiser_of_call(i, to)(x, self._time(self.times[i], x), c)
        if not to and self.transition.ends_at_data:
            return pred.x0, torch.zeros_like(pred.sigma)
        mean, std = self._moments(pred.x0, to)
        if self.transition.keeps_noise:
            old, new = ancestral_shares(self.denoiser.path, self._time(self.times[i], x), self._time(to, x), x)
            return mean + std * old * pred.eps, std * new
        return (mean, std) if self.transition.adds_noise else (mean + std * pred.eps, torch.zeros_like(std))

    def renoise_from(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """x_s [B, ...] from x_t and a sample x0 by this student's transition, at times t >= s [B], with unit noise."""
        assert self.transition.adds_noise, "a transition without new noise"
        path = self.denoiser.path
        if not self.transition.keeps_noise:
            return path.diffuse(x0, noise, s)
        old, new = ancestral_shares(path, t, s, x0)
        alpha, sigma = (expand(one, x0) for one in path.coefficients(t))
        return path.diffuse(x0, old * (x_t - alpha * x0) / sigma + new * noise, s)

    def _time(self, t: float, x: Tensor) -> Tensor:
        return torch.full((len(x),), t, dtype=torch.float64, device=x.device)

    def _moments(self, x0: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t given x0."""
        alpha, sigma = self.denoiser.path.coefficients(self._time(t, x0))
        return expand(alpha, x0) * x0, expand(sigma, x0)

    def _sample(self, mean: Tensor, std: Tensor, i: int, draw: Draw | None) -> Tensor:
        """x after call i, with that call's own noise."""
        return mean + std * self._noise(i, mean, draw) if self.transition.adds_noise else mean

    def _noise(self, i: int, x: Tensor, draw: Draw | None) -> Tensor:
        if draw is None:
            raise ValueError("a student with fresh noise between its steps needs `draw` to generate")
        return draw.normal(f"renoise{i}", tuple(x.shape)).to(x)


def check_phases(student: Student, N: int) -> None:
    """ValueError unless a student of phases on a grid of N steps (PCM) is called as in training."""
    many = len(student.times)
    table = isinstance(student.denoiser.schedule, VP)
    if many > N:
        raise ValueError(f"N is {N}; it must be at least the student's {many} calls, which are its phases")
    transition = student.transition
    if (table and transition.ends_at_data) or (many > 1 and transition.adds_noise):
        raise ValueError(
            f"student.renoise is {student.renoise!r}; a student of phases goes from one to the next without new noise, "
            "and ends at the level of t = 0: pass --student.renoise tcd" + " --student.scale 1" * table
        )


def validate_times(times: tuple[float, ...]) -> None:
    """ValueError unless the student's times are at least one, strictly decreasing and in (0, 1]."""
    if not times or not all(a > b for a, b in zip((1.1, *times), (*times, 0.0), strict=True)) or times[0] > 1:
        raise ValueError(f"student times are {times}; they must fall strictly within (0, 1], at least one")


def grid_times(steps: int, first: float = 1.0) -> tuple[float, ...]:
    """`steps` times falling uniformly from `first`: first * (1 - i / steps)."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    return tuple(first * (1 - i / steps) for i in range(steps))
