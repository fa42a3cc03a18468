"""The first iteration of a run that chooses its own micro-batch: it is made anew with half of it if memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from distill.networks.ema import unshared_parameters
from distill.networks.multiplier import Multiplier
from distill.sharding import part
from distill.training.state import State

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
Moments = dict[Tensor, dict[str, object]]  # state of an optimizer by parameter


class MicroBatchError(ValueError):
    """A micro-batch of one sample does not fit into the memory of a device."""


class OutOfMemory(Exception):
    """Memory ran out on at least one process. All processes raise it at the same place."""


class MemoryGuard:
    """Calls functions. While it is active, all processes raise OutOfMemory if one of them runs out of memory in a call.

    Collective while it is active: all processes must make the same calls, and a call must not communicate.
    """

    def __init__(self, accelerator: Accelerator, active: bool) -> None:
        self.accelerator = accelerator
        self.active = active

    def __call__(self, work: Callable[[], T]) -> T:
        if not self.active:
            return work()
        reason = ""
        try:
            result = work()
        except torch.OutOfMemoryError as error:  # its traceback holds the tensors of the call until the block ends
            reason = str(error).split("\n")[0][:200] or "out of memory"
        failures = torch.full((), float(bool(reason)), device=self.accelerator.device)
        if self.accelerator.reduce(failures, "sum") > 0:
            raise OutOfMemory(reason or "on another process")
        return result


class Snapshot:
    """Copies on the CPU of everything that an iteration changes in a state, to make the iteration anew."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.tensors = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _changed_tensors(state)]
        self.moments = {name: _copy_moments(optimizer.state) for name, optimizer in state.optimizers.items()}
        self.skipped = {**state.skipped}

    @torch.no_grad()
    def restore(self) -> None:
        """Set the state back, drop its gradients and free the memory of the iteration."""
        for tensor, copy in self.tensors:
            tensor.copy_(copy)
        for name, optimizer in self.state.optimizers.items():
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
            for parameter, values in self.moments[name].items():
                optimizer.state[parameter] = {key: _to_device(value) for key, value in values.items()}
        self.state.skipped = {**self.skipped}
        self.state.logs = {}
        for module in self.state.nets.student.denoiser.net.modules():
            if isinstance(module, Multiplier):
                module.at = None  # the losses of this step are recorded anew
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def smaller_micro_batch(share: int, micro: int) -> int | None:
    """The largest size that divides a process's `share` of the batch and is at most half of `micro`; None below 1."""
    return next((size for size in range(micro // 2, 0, -1) if share % size == 0), None)


def _changed_tensors(state: State) -> Iterator[Tensor]:
    """The local parts of trained and averaged weights, and of all buffers, each once."""
    student = state.nets.student.denoiser.net
    target = state.nets.target
    averages = [state.ema.net] + ([] if target is None else [target.net])
    tensors = [
        p for optimizer in state.optimizers.values() for group in optimizer.param_groups for p in group["params"]
    ]
    for net in averages:
        tensors += unshared_parameters(net, student)[0] if net is not student else []
    for net in (*state.nets.modules().values(), *averages):
        tensors += net.buffers()
    yield from {id(tensor): part(tensor) for tensor in tensors}.values()


def _copy_moments(moments: Moments) -> dict[Tensor, dict[str, tuple[object, torch.device | None]]]:
    """The values of an optimizer with tensors on the CPU, each with the device that it came from."""
    return {
        parameter: {
            key: (value.detach().to("cpu", copy=True), value.device) if isinstance(value, Tensor) else (value, None)
            for key, value in values.items()
        }
        for parameter, values in moments.items()
    }


def _to_device(value: tuple[object, torch.device | None]) -> object:
    copy, device = value
    return copy.to(device, copy=True) if isinstance(copy, Tensor) else copy
