"""The student: a denoiser called at few times, from noise to a sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from distill.denoiser import Condition, Denoiser

if TYPE_CHECKING:
    from distill.draw import Draw


@dataclass(eq=False)
class Student:
    """G(z, c): x <- scale z; at each time x0 = denoiser(x, t, c).x0, then x is brought to the next time.

    times    from noisy to clean, in (0, 1]; one time is a one-step student.
    scale    of the unit noise z at the first call; None is sigma(times[0]) (DMD2's latents: 1).
    renoise  "fresh" noise between calls (DMD2, consistency), or "ddim": the noise that the call itself predicts.
    """

    denoiser: Denoiser
    times: tuple[float, ...] = (1.0,)
    scale: float | None = None
    renoise: Literal["fresh", "ddim"] = "fresh"

    def __post_init__(self) -> None:
        self.times = tuple(float(t) for t in self.times)
        falling(self.times)
        if self.renoise not in ("fresh", "ddim"):
            raise ValueError(f"renoise is {self.renoise!r}; it must be 'fresh' or 'ddim'")

    def using(self, net: nn.Module) -> Student:
        """The same student with other weights: its average, say."""
        return replace(self, denoiser=replace(self.denoiser, net=net))

    @property
    def input_scale(self) -> float:
        if self.scale is not None:
            return self.scale
        return float(self.denoiser.path.coefficients(torch.tensor([self.times[0]], dtype=torch.float64))[1])

    def generate(self, z: Tensor, c: Condition, draw: Draw | None = None, steps: int | None = None) -> Tensor:
        """x0 [B, ...] after `steps` calls (default: all) from unit noise z; gradient flows through the last call only.

        Noise between calls is draw.normal("renoise0"), "renoise1", ...
        """
        steps = len(self.times) if steps is None else steps
        if not 1 <= steps <= len(self.times):
            raise ValueError(f"steps is {steps}; this student has {len(self.times)} time(s), so 1 to {len(self.times)}")
        path = self.denoiser.path
        times = [torch.full((len(z),), t, dtype=torch.float64, device=z.device) for t in self.times]
        x = self.input_scale * z
        known = draw.before if draw is not None and self.renoise == "fresh" else None  # x0 of the last call but one
        for i in range(0 if known is None else max(0, steps - 2), steps - 1):
            with torch.no_grad():
                x0 = known
                if known is None:
                    pred = self.denoiser(x, times[i], c)
                    x0 = pred.x0
                if self.renoise == "ddim":
                    eps = pred.eps
                elif draw is None:
                    raise ValueError("a student with fresh noise between its steps needs `draw` to generate")
                else:
                    eps = draw.normal(f"renoise{i}", tuple(z.shape)).to(z)
                x = path.diffuse(x0, eps, times[i + 1])
        return self.denoiser(x, times[steps - 1], c).x0


def falling(times: tuple[float, ...]) -> None:
    """ValueError unless the student's times, one at least, fall strictly within (0, 1]."""
    if not times or not all(a > b for a, b in zip((1.1, *times), (*times, 0.0), strict=True)) or times[0] > 1:
        raise ValueError(f"student times are {times}; they must fall strictly within (0, 1], at least one")


def grid_times(steps: int, first: float = 1.0) -> tuple[float, ...]:
    """`steps` times falling uniformly from `first`: first * (1 - i / steps)."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    return tuple(first * (1 - i / steps) for i in range(steps))
