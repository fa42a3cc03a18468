"""What an image costs: parameters, latency, images per second, peak memory; on which machine, by which commit.

python -m eval.generate --model runs/dmd2/pipeline --out runs/samples/dmd2 --cost runs/cost.json
"""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import torch

DENOISERS = ("unet", "transformer", "transformer_2", "prior")  # components that a denoising step calls


def hardware(device: str | torch.device = "cpu") -> str:
    """The machine in words: the accelerator's name, or the processor with the threads that torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} of {_processor()}"
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def parameters(pipe: object) -> int:
    """Parameters of the networks that denoise; of every network where a pipeline calls them otherwise."""
    parts = {k: v for k, v in getattr(pipe, "components", {}).items() if isinstance(v, torch.nn.Module)}
    denoisers = [v for k, v in parts.items() if k in DENOISERS]
    return sum(p.numel() for net in denoisers or parts.values() for p in net.parameters())


def measure_cost(
    make: Callable[[int], object],
    batch: int = 8,
    seconds: float = 0.5,
    device: str | torch.device = "cpu",
) -> dict[str, float | str]:
    """Time `make(k)`, which makes k images on `device` -> latency, images_per_second, peak_memory, batch, hardware.

    latency: seconds of one image alone; images_per_second: in batches of `batch`; each the median of at least three
    calls that together take `seconds`, after one that is not counted. peak_memory: bytes; on CUDA of its tensors,
    else resident memory of this process with its libraries, so measure in a process of its own. ValueError for a
    batch below 1.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    device = torch.device(device)
    _reset_peak_memory(device)
    alone = _time_call(lambda: make(1), seconds, device)
    together = alone if batch == 1 else _time_call(lambda: make(batch), seconds, device)
    return {
        "latency": alone,
        "images_per_second": batch / together,
        "peak_memory": _peak_memory(device),
        "batch": batch,
        "hardware": hardware(device),
    }


def _time_call(call: Callable[[], object], seconds: float, device: torch.device) -> float:
    spans: list[float] = []
    for counted in (False, *[True] * 1000):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        if counted:
            spans.append(time.perf_counter() - start)
        if len(spans) >= 3 and sum(spans) >= seconds:
            break
    return median(spans)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory: on CUDA, and on Linux where the process may write clear_refs. Elsewhere it stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def git_commit() -> str | None:
    """12 hex digits of this checkout's commit, with "-dirty" if tracked files differ from it.

    None without git, and if the package is installed inside a checkout of another project.
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", f"{here.parent}", *words], capture_output=True, text=True, timeout=60)
        done.check_returncode()
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "--short=12", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None
