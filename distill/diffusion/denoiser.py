"""A denoiser: a network, the schedule and prediction kind of its training, and the way to call it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill import sharding
from distill.diffusion.interval import Interval
from distill.diffusion.schedule import KINDS, Kind, Prediction, Schedule, expand

Condition = dict[str, Tensor] | None
Taps = tuple[str, ...] | None  # names of submodules whose outputs are features; None: the denoiser's own
Call = Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
Feature = Callable[[tuple[Tensor, ...]], Tensor]  # picks the feature from the output tuple of a tapped module


def plain(net: nn.Module, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    """net(x, native t, **c): the default way to call a network."""
    return net(x, t, **(c or {}))


@dataclass(eq=False)
class Denoiser:
    """net + schedule + kind: (x [B, ...], t [B] in [0, 1], c) -> Prediction.

    call    call(net, x, native_t, c) -> out; adapts a network's own signature. An optional attribute feature(output)
            picks the feature from a tuple that a tapped module returns; the default is the first element.
    null    the null condition ("no condition"): the same keys as c, leading dimension 1.
    sigma_d standard deviation of the data in EDM's preconditioning (kind "edm" only).
    frame   the schedule of the inputs x and t; None: the network's own schedule. See `on`.
    blocks  class names of the submodules that are gathered one by one if the network is sharded (sharding.py).
    taps    default features of discriminators: submodules that the teacher's family names.
    """

    net: nn.Module
    schedule: Schedule
    kind: Kind
    call: Call = plain
    null: Condition = None
    sigma_d: float = 0.5
    frame: Schedule | None = None
    blocks: tuple[str, ...] = ()
    taps: tuple[str, ...] = ("mid_block",)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {KINDS}")

    def __call__(self, x: Tensor, t: Tensor, c: Condition = None) -> Prediction:
        """Predict at x = alpha_t x0 + sigma_t eps, with alpha and sigma of the frame."""
        u = t
        x, t, scale = self._native(x, t)
        alpha, sigma = self.schedule.coefficients(t)
        like = next(self.net.parameters(), x)
        native = self.schedule.native(t).to(torch.promote_types(x.dtype, torch.float32))
        out = self.call(self.net, x.to(like.dtype), native, c).to(x.dtype)
        pred = Prediction(out, self.kind, x, expand(alpha, x), expand(sigma, x), self.sigma_d)
        if isinstance(self.frame, Interval):
            return self.frame.to_interval(pred, u)
        return pred if scale is None else ConvertedPrediction(**vars(pred), scale=scale)

    def _native(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Carry (x, t) from the frame to the network's schedule: the same ratio, x rescaled to the same signal."""
        if self.frame is None:
            return x, t, None
        if isinstance(self.frame, Interval):
            assert self.frame.base == self.schedule, "an interval of another path than the network's"
            return x, self.frame.outer(t), None
        a_f, s_f = self.frame.coefficients(t)
        t = self.schedule.time(s_f / a_f)
        a, s = self.schedule.coefficients(t)
        scale = expand(torch.hypot(a, s) / torch.hypot(a_f, s_f), x)
        return scale * x, t, scale

    def on_schedule(self, schedule: Schedule) -> Denoiser:
        """The same denoiser with another schedule for its callers: x and t are of `schedule`, x0 and eps are unchanged.

        On an Interval of its own schedule, x0 and eps are x_s and the noise since s.
        """
        return replace(self, frame=None if schedule == self.schedule else schedule)

    @property
    def path(self) -> Schedule:
        """The schedule of this denoiser's inputs x and t."""
        return self.frame or self.schedule

    @property
    def dual(self) -> bool:
        """Whether forward-mode differentiation can keep a graph for backward: recomputed and sharded blocks cannot."""
        return not (getattr(self.net, "is_gradient_checkpointing", False) or sharding.sharded(self.net))

    def resolve_taps(self, taps: Taps) -> tuple[str, ...]:
        """`taps`, or this denoiser's own taps if `taps` is None."""
        return self.taps if taps is None else taps

    def predict_with_features(self, x: Tensor, t: Tensor, c: Condition, taps: Taps) -> tuple[Prediction, list[Tensor]]:
        """The prediction, and the outputs of the named submodules in the same forward pass."""
        taps = self.resolve_taps(taps)
        with capture_features(self.net, taps, False, getattr(self.call, "feature", first_output)) as found:
            pred = self(x, t, c)
        return pred, [found[name] for name in taps]

    def features(self, x: Tensor, t: Tensor, c: Condition, taps: Taps) -> list[Tensor]:
        """Outputs of the named submodules, with gradient. The forward pass ends after the last one that it reaches."""
        taps = self.resolve_taps(taps)
        with capture_features(self.net, taps, True, getattr(self.call, "feature", first_output)) as found:
            try:
                self(x, t, c)
            except _StopForward:
                sharding.close_fsdp_forward(self.net, [*found.values()])
        return [found[name] for name in taps]

    def copy(self) -> Denoiser:
        """A copy with a deep copy of the network. Everything else is shared."""
        return replace(self, net=copy.deepcopy(self.net))


@dataclass(frozen=True)
class ConvertedPrediction(Prediction):
    """A prediction on another schedule: x0 and eps are the same numbers, v and score are those of the frame."""

    scale: Tensor | float = 1.0  # native x = scale * the frame's x

    @property
    def v(self) -> Tensor:
        return (self.alpha * self.eps - self.sigma * self.x0) / self.scale

    @property
    def score(self) -> Tensor:
        return -self.eps / self.sigma * self.scale


class _StopForward(Exception):
    """Raised at the last tap to stop the forward pass."""


def first_output(output: tuple[Tensor, ...]) -> Tensor:
    """The first element of a module's output tuple."""
    return output[0]


@contextmanager
def capture_features(
    net: nn.Module, taps: tuple[str, ...], stop: bool = False, feature: Feature = first_output
) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the submodules `taps` in one forward pass; with `stop`, end it after the last one.

    The hooks exist only inside this context, so a copied network never reports the features of its original.
    """
    found: dict[str, Tensor] = {}
    try:
        modules = {name: net.get_submodule(name) for name in taps}
    except AttributeError as error:
        top = [name for name, _ in net.named_children()]
        raise ValueError(f"no submodule {list(taps)} to tap ({error}); the top-level modules are {top}") from None

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found[name] = feature(output) if isinstance(output, tuple) else output
            if stop and len(found) == len(taps):
                raise _StopForward

        return keep

    handles = [modules[name].register_forward_hook(hook(name)) for name in taps]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
