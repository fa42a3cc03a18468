"""The processes of a command: their start, signals that end them, and output of libraries."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from distill.files import RANKS
from distill.layout import RECIPES

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from distill.training.config import TrainConfig


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


def choose_precision(given: str | None) -> tuple[str | None, str]:
    """(precision for Accelerator, why) of a run whose flag --mixed_precision is `given`; None: that of the launcher."""
    import torch

    if given is not None:
        return given, "--mixed_precision"
    if is_precision_given():
        return None, "of the launcher"
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "the GPU supports it; --mixed_precision no is float32"
    return "no", "the device has no fast bfloat16; --mixed_precision bf16 is for GPUs that have"


def is_precision_given() -> bool:
    """Whether the line or the configuration of `accelerate launch` gives a precision.

    accelerate passes on "no" where none is given. Then its line tells, and the file of `accelerate config`.
    """
    from accelerate.commands.config import config_args

    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision != "no":
        return precision is not None
    words = launcher_words()
    flags = ("--mixed_precision", "--mixed-precision", "--config_file", "--config-file")
    return words is None or any(w.startswith(flags) for w in words) or os.path.isfile(config_args.default_config_file)


def launcher_words() -> list[str] | None:
    """The command line of the process above this one; None where the system does not show it."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return None


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a GPU; None for other devices, which share the memory of the machine."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def report_batch(cfg: TrainConfig, accelerator: Accelerator, reason: str) -> None:
    """Print one line: how the global batch is divided, and the precision with the reason of its choice."""
    if not accelerator.is_main_process:
        return
    processes = accelerator.num_processes
    micro = cfg.micro_batch(processes)
    name = {"no": "float32", "bf16": "bfloat16"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    sys.stderr.write(
        f"{micro} image(s) in a micro-batch x {cfg.rounds} micro-batch(es) x {processes} process(es) = "
        f"{cfg.train_batch_size} images an update; precision {name} ({reason})\n"
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
