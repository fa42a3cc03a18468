"""What the loop costs: time of a turn over the bare network calls that it must make, and peak memory, per method.

Each turn of `train` (draws, losses, optimizer, EMA, log values included) against the same forward and backward passes
of the bare network at the same batch, interleaved, medians of CPU seconds of one thread (or synchronised CUDA time).
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

# The passes that a turn must make: n no-grad forward; f forward and full backward; i forward and backward to the input
# of a frozen network; c, ci, cf the same up to the discriminator's tap; j forward-mode derivative. Prefix 2: on 2B.
PASSES = {
    "DMD2": {"student": "f n n ci", "fake": "n f 2cf"},
    "SiD": {"student": "f i i", "fake": "n f"},
    "VSD": {"student": "f n n", "fake": "n f"},
    "LCD": {"student": "f n n n"},  # Heun's method: two calls of the teacher, and the target
    "SCM": {"student": "f n j"},
}


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    output: Path | None = Path("docs/bench.md")  # None: the terminal only
    batch: int = 64
    rounds: int = 30  # timed repetitions of everything
    channels: tuple[int, ...] = (16, 32)  # of the digits UNet
    memory_of: str | None = None  # one method: print its peak memory in MiB and stop (used by the benchmark itself)


def methods() -> dict[str, Any]:
    from distill.methods import DMD2, LCD, SCM, VSD, SiD

    return {
        "DMD2": DMD2(every=1),
        "SiD": SiD(),
        "VSD": VSD(guidance=1.0),
        "LCD": LCD(N=18, solver="heun"),
        "SCM": SCM(sigma_d=0.75),
    }


class Turn:
    """One player's turn of a method as a method of its own."""

    def __init__(self, method: Any, player: str) -> None:
        self.roles, self.needs, self.sample = method.roles, method.needs, method.sample
        self.update = next(u for u in method.updates() if u.player == player)
        if hasattr(method, "taps"):
            self.taps = method.taps
        if hasattr(method, "after"):
            self.after = method.after

    def updates(self) -> list[Any]:
        return [self.update]


def turns(method: Any, player: str, cfg: Bench) -> Callable[[], Any]:
    """A function that makes one turn of `player` through train()."""
    from accelerate import Accelerator

    from distill.data import Digits
    from distill.roles import StudentConfig, build
    from distill.trainer import TrainConfig, train
    from pipelines import edm

    teacher = edm.teacher(edm.unet(cfg.channels), 0.75, 10)
    turn = Turn(method, player)
    nets = build(turn, teacher.denoiser, teacher.shape, teacher.encode([0]), StudentConfig(sigma=2.5))
    settings = TrainConfig(max_train_steps=10**9, train_batch_size=cfg.batch)
    loop = train(turn, nets, Digits(), settings, Accelerator())
    return lambda: next(loop)


def bare(kind: str, cfg: Bench) -> Callable[[], Any]:
    """One bare pass of the network, as `PASSES` names it."""
    import torch
    from accelerate import Accelerator

    from distill.denoiser import _Reached, tapped
    from distill.losses import jvp
    from pipelines import edm

    device = Accelerator().device
    net, B = edm.unet(cfg.channels).to(device), cfg.batch * (2 if kind.startswith("2") else 1)
    kind = kind.removeprefix("2")
    x, t = torch.randn(B, 1, 8, 8, device=device), torch.randn(B, device=device)
    labels = torch.arange(B, device=device) % 10
    net.requires_grad_(kind in ("f", "cf"))

    def forward(x: Any = x, t: Any = t) -> Any:
        if not kind.startswith("c"):
            return net(x, t, class_labels=labels, return_dict=False)[0]
        with tapped(net, ("mid_block",), stop=True) as found:
            try:
                net(x, t, class_labels=labels)
            except _Reached:
                return found["mid_block"]

    def run() -> None:
        if kind == "n":
            with torch.no_grad():
                forward()
        elif kind == "j":
            jvp(forward, (x, t), (x, t))
        elif kind in ("f", "cf"):
            net.zero_grad(set_to_none=True)
            forward().sum().backward()
        else:
            leaf = x.clone().requires_grad_()
            forward(leaf).sum().backward()

    return run


def clock(run: Callable[[], Any]) -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    run()
    return time.process_time() - began


def peak(name: str, cfg: Bench) -> float:
    """Peak memory in MiB of a few steps: of CUDA where there is one, else of the process."""
    import torch

    for player in PASSES[name]:
        turn = turns(methods()[name], player, cfg)
        for _ in range(3):
            turn()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")  # ru_maxrss would count the parent's peak too
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 2**10


def main(cfg: Bench) -> None:
    import torch

    torch.set_num_threads(1)
    if cfg.memory_of:
        sys.stdout.write(json.dumps(peak(cfg.memory_of, cfg)))
        return
    from tqdm import tqdm

    runs = {(m, p): turns(method, p, cfg) for m, method in methods().items() for p in PASSES[m]}
    kinds = {kind: bare(kind, cfg) for m in PASSES for p in PASSES[m].values() for kind in p.split()}
    everything: dict[Any, Callable[[], Any]] = runs | kinds
    times: dict[Any, list[float]] = {key: [] for key in everything}
    for round_ in tqdm(range(cfg.rounds + 3), desc="rounds", unit="round"):
        for key, run in everything.items():
            seconds = clock(run)
            if round_ >= 3:  # the first are warm-up
                times[key].append(seconds)
    median = {key: statistics.median(values) for key, values in times.items()}

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()}), one thread"
    flags = ["--channels", *map(str, cfg.channels), "--batch", str(cfg.batch)]
    lines = ["| method | turn | passes | bare ms | turn ms | ratio | peak MiB |", "|---|---|---|---|---|---|---|"]
    for m in PASSES:
        command = [sys.executable, __file__, "--memory_of", m, *flags]
        mib = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        for p, passes in PASSES[m].items():
            need, took = sum(median[k] for k in passes.split()), median[m, p]
            lines.append(
                f"| {m} | {p} | {passes} | {need * 1e3:.1f} | {took * 1e3:.1f} | {took / need:.2f} | {mib:.0f} |"
            )
    text = f"""# What the loop costs

`make bench`: digits UNet {cfg.channels}, batch {cfg.batch}, {device}, torch {torch.__version__}, medians of
{cfg.rounds} interleaved rounds.

Passes: n no-grad forward, f forward and full backward, i forward and backward to the input of a frozen network, c.. the
same up to the discriminator's tap, j forward-mode derivative, 2.. on real and generated images together. A turn also
draws its noise, steps Adam, averages the student and checks the gradient. Peak memory is of the whole
process on a CPU (torch and diffusers themselves are most of it), of CUDA's allocator on a GPU.

""" + "\n".join(lines)
    sys.stdout.write(text + "\n")
    if cfg.output is not None:
        cfg.output.parent.mkdir(exist_ok=True)
        cfg.output.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Bench, use_underscores=True, description=__doc__))
