"""The processes of a command: their start, signals that end them, and output of libraries."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from distill.files import RANKS
from distill.layout import RECIPES

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


def start_accelerator(days: int = 1, **options: object) -> Accelerator:
    """Join the processes of a command. They wait `days` for a process that downloads, encodes or saves.

    Several processes without an accelerator share the work on the CPU. Otherwise each would do all of the work.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    warn_single_process()
    cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days))], **options)


def warn_single_process() -> None:
    """Warn if `accelerate launch` was asked for several processes but started only this one.

    This happens with fewer than two GPUs: --num_processes 2, with or without --cpu, only sets their address.
    """
    known = os.environ.keys()
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= known and not known & {"LOCAL_RANK", *RANKS}:
        sys.stderr.write(
            "warning: accelerate launch was asked for several processes and has started this one alone, for it sees "
            f"fewer than two GPUs. On the CPU launch two by --config_file {RECIPES / 'accelerate' / 'cpu2.yaml'}\n"
        )


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a GPU; None for other devices, which share the memory of the machine."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def warn_float32(accelerator: Accelerator) -> None:
    """Warn if a run on a GPU was launched without a precision, which is float32: twice the activations, and slow."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision != "no" or not accelerator.is_main_process:
        return
    sys.stderr.write(
        "warning: this run trains in float32, as accelerate does where no precision is given. For bfloat16 launch it "
        f"by `accelerate launch --mixed_precision bf16 ...` or --config_file {RECIPES / 'accelerate' / 'gpu1.yaml'}\n"
    )


def silence_libraries() -> None:
    """Switch off messages of diffusers and transformers about loading and saving, which do not concern the run."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def launcher_process() -> int | None:
    """The process of `accelerate launch` or torchrun above this one. None: a shell, which may end before its jobs."""
    return os.getppid() if os.environ.keys() & {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} else None


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that the first Ctrl-C, SIGTERM or SIGUSR1 is appended to, so that a run can stop between two steps.

    The second signal interrupts. The exit status is then 128 + the signal: 130, 143, 138.
    """
    caught: list[int] = []

    def handle(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt(number)
        caught.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
