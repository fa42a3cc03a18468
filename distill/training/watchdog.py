"""Report a step that hangs, and make the processes of a run agree when to stop."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Watchdog:
    """Reports a step that hangs. Use `with Watchdog(...) as watch`, and call `watch(step)` when a step begins.

    A step longer than `seconds` (0: no limit) is reported once, on stderr and in `out`/hang-rankN.txt, with its number
    and the stacks of all threads. The run continues. A step costs two assignments. faulthandler's timer would also work
    while native code holds Python's lock, which stops this thread. But it reads the stacks without that lock, which can
    crash a run that is only slow.
    """

    def __init__(self, seconds: float, out: Path, rank: int, step: int = 0) -> None:
        self.seconds = seconds
        self.out = out
        self.rank = rank
        self._now = (step, time.monotonic())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __call__(self, step: int) -> None:
        self._now = step, time.monotonic()

    def __enter__(self) -> Watchdog:
        self(self._now[0])
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self.seconds:
            self._thread.join()

    def _watch(self) -> None:
        told: tuple[int, float] | None = None
        while not self._over.wait(self.seconds / 4):
            step, since = now = self._now
            if time.monotonic() - since > self.seconds and told != now:
                told = now
                self._report(f"rank {self.rank}: step {step} has taken more than {self.seconds:g} s (hang_seconds)")

    def _report(self, said: str) -> None:
        path = self.out / f"hang-rank{self.rank}.txt"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with path.open("a+") as file:
                start = file.tell()
                file.write(f"{said}; the stacks of its threads:\n")
                file.flush()
                faulthandler.dump_traceback(file)
                file.seek(start)
                sys.stderr.write(file.read())
        except OSError as error:
            sys.stderr.write(f"{said}; {path} cannot be written ({error})\n")


class Agreement:
    """The signal on which all processes stop. Each process calls it after every step. All get the largest number; 0:
    none.

    On CUDA the answer is that of the previous step, which has arrived, so that the host never waits. A single process
    gets its own number.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.device = accelerator.device
        self.alone = accelerator.num_processes == 1
        self.answer: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, number: int) -> int:
        if self.alone:
            return number
        greatest = torch.full((), number, device=self.device)  # filled on the device: a copy from the host would wait
        torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX)
        if self.device.type != "cuda":
            return int(greatest)
        before = self.answer
        event = torch.cuda.Event()
        host = torch.empty((), dtype=greatest.dtype, pin_memory=True).copy_(greatest, non_blocking=True)
        event.record()
        self.answer = host, event
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])
