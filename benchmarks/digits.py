"""What the loop costs: its time over the bare network calls that it must make, per turn and as a whole; memory; stalls.

Each turn of `train` (draws, losses, optimizer, EMA, log values included), and whole runs with accumulation, a log and
checkpoints, against the same forward and backward passes of the bare network at the same batch, interleaved, medians
of CPU seconds of one thread (or synchronised CUDA time). How long training stands still for a checkpoint is wall time.
"""

from __future__ import annotations

import copy
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from tqdm import tqdm

if TYPE_CHECKING:
    from distill.training.config import TrainConfig
    from distill.training.state import State

# The passes that a turn must make: n no-grad forward; f forward and full backward; i forward and backward to the input
# of a frozen network; c, ci, cf the same up to the discriminator's tap and through its head; j forward-mode derivative.
# Prefix 2: on 2B.
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
    rounds: int = 30  # timed repetitions of every turn and pass, and saves of either kind
    blocks: int = 3  # timed stretches of a run of 50 steps, a log line every 10th, a checkpoint at the last
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


def alone(method: Any, player: str) -> Any:
    """The method with the turn of one player only."""
    one = copy.copy(method)
    update = next(u for u in method.updates() if u.player == player)
    object.__setattr__(one, "updates", lambda: [update])
    return one


def loop(method: Any, settings: TrainConfig, cfg: Bench) -> Iterator[State]:
    """train() of a method on the digits UNet."""
    from accelerate import Accelerator

    from distill.data import Digits
    from distill.training.build import build
    from distill.training.config import StudentConfig
    from distill.training.loop import train
    from pipelines.families import edm

    teacher = edm.teacher(edm.unet(cfg.channels), 0.75, 10)
    nets = build(method, teacher.denoiser, teacher.shape, teacher.encode([0]), StudentConfig(sigma=2.5))
    return train(method, nets, Digits(), settings, Accelerator())


def turns(method: Any, player: str, cfg: Bench) -> Callable[[], Any]:
    """A function that makes one turn of `player` through train()."""
    from distill.training.config import TrainConfig

    states = loop(alone(method, player), TrainConfig(max_train_steps=10**9, train_batch_size=cfg.batch), cfg)
    return lambda: next(states)


def whole(method: Any, cfg: Bench, folder: Path) -> Callable[[], None]:
    """A function that makes ten steps of two micro-batches and a line of the log, and every fifth time a checkpoint."""
    from accelerate import Accelerator

    from distill.training.checkpoint import Saver
    from distill.training.config import TrainConfig
    from distill.training.log import Log

    settings = TrainConfig(
        output_dir=f"{folder}",
        max_train_steps=10**9,
        train_batch_size=2 * cfg.batch,
        gradient_accumulation_steps=2,
        logging_steps=10,
        checkpointing_steps=50,
    )
    folder.mkdir()
    with redirect_stderr(StringIO()):  # where its progress bar goes
        log = Log(settings, Accelerator())
    saver = Saver(folder, settings.checkpoints_total_limit)
    states = loop(method, settings, cfg)

    def run() -> None:
        for state in itertools.islice(states, 10):
            log(state)
        if state.step % settings.checkpointing_steps == 0:
            saver.save(state)

    return run


def needed(method: Any, passes: dict[str, str]) -> list[str]:
    """The passes of one micro-batch of every player; samples that a player takes from another are made once."""
    kinds = []
    for i, update in enumerate(method.updates()):
        own = passes[update.player].split()
        kinds += own[own[0] == "n" :] if update.reuse and i else own
    return kinds


def stall(method: Any, cfg: Bench, folder: Path) -> tuple[float, float, float]:
    """(MiB of a checkpoint, seconds that training waits for `checkpoint.save`, for a Saver), saved in turn."""
    from distill.training import checkpoint
    from distill.training.config import TrainConfig

    states = loop(method, TrainConfig(max_train_steps=10**9, train_batch_size=cfg.batch), cfg)
    times: dict[str, list[float]] = {"sync": [], "async": []}
    saver = checkpoint.Saver(folder / "async", 2)
    saves = {"sync": lambda state: checkpoint.save(state, folder / "sync", 2), "async": saver.save}
    for state in itertools.islice(states, cfg.rounds + 1):
        for name, save in saves.items():
            synchronize()
            began = time.perf_counter()
            save(state)
            times[name].append(time.perf_counter() - began)
        saver.wait()
    size = sum(file.stat().st_size for file in checkpoint.list_intact_checkpoints(folder / "sync")[-1].iterdir())
    return size / 2**20, *(statistics.median(seconds[1:]) for seconds in times.values())


def bare(kind: str, cfg: Bench) -> Callable[[], Any]:
    """One bare pass of the network, as `PASSES` names it."""
    import torch
    from accelerate import Accelerator

    from distill.diffusion.denoiser import _StopForward, capture_features
    from distill.losses import jvp
    from distill.networks.discriminator import head
    from pipelines.families import edm

    device = Accelerator().device
    net = edm.unet(cfg.channels).to(device)
    B = cfg.batch * (2 if kind.startswith("2") else 1)
    kind = kind.removeprefix("2")
    x = torch.randn(B, 1, 8, 8, device=device)
    t = torch.randn(B, device=device)
    labels = torch.arange(B, device=device) % 10
    net.requires_grad_(kind in ("f", "cf"))

    def feature(x: Any) -> Any:
        with capture_features(net, ("mid_block",), stop=True) as found:
            try:
                net(x, t, class_labels=labels)
            except _StopForward:
                return found["mid_block"]

    disc = head(feature(x)).to(device).requires_grad_(kind == "cf") if kind.startswith("c") else None

    def forward(x: Any = x, t: Any = t) -> Any:
        return net(x, t, class_labels=labels, return_dict=False)[0] if disc is None else disc(feature(x))

    def run() -> None:
        if kind == "n":
            with torch.no_grad():
                forward()
        elif kind == "j":
            jvp(forward, (x, t), (x, t))
        elif kind in ("f", "cf"):
            for module in filter(None, (net, disc)):
                module.zero_grad(set_to_none=True)
            forward().sum().backward()
        else:
            leaf = x.clone().requires_grad_()
            forward(leaf).sum().backward()

    return run


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(run: Callable[[], Any]) -> float:
    import torch

    now = time.perf_counter if torch.cuda.is_available() else time.process_time
    synchronize()
    began = now()
    run()
    synchronize()
    return now() - began


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


def steps(
    method: Any, passes: list[str], kinds: dict[str, Callable[[], Any]], cfg: Bench, folder: Path
) -> tuple[float, float]:
    """Seconds of a step of a whole run: of its bare passes, and in all. Passes are timed between ten steps and ten."""
    run = whole(method, cfg, folder)
    bare = []
    together = []
    clock(run)  # the first is warm-up
    for _ in tqdm(range(5 * cfg.blocks), desc=folder.name, unit="ten steps"):
        together.append(clock(run))
        bare += [sum(clock(kinds[kind]) for kind in passes) for _ in range(2)]
    return 2 * statistics.median(bare), statistics.mean(together) / 10


def main(cfg: Bench) -> None:
    import torch

    torch.set_num_threads(1)
    if cfg.memory_of:
        sys.stdout.write(json.dumps(peak(cfg.memory_of, cfg)))
        return
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
    lines = ["| method | update | passes | bare ms | update ms | ratio | peak MiB |", "|---|---|---|---|---|---|---|"]
    for m in PASSES:
        command = [sys.executable, __file__, "--memory_of", m, *flags]
        mib = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        for p, passes in PASSES[m].items():
            need = sum(median[k] for k in passes.split())
            took = median[m, p]
            lines.append(
                f"| {m} | {p} | {passes} | {need * 1e3:.1f} | {took * 1e3:.1f} | {took / need:.2f} | {mib:.0f} |"
            )
    rows = ["| method | bare ms | step ms | ratio | checkpoint MiB | stall ms, sync | stall ms, async | ratio |"]
    rows += ["|---|---|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        for m, method in methods().items():
            need, took = steps(method, needed(method, PASSES[m]), kinds, cfg, Path(name) / m)
            mib, sync, async_ = stall(method, cfg, Path(name) / f"{m} stall")
            rows.append(
                f"| {m} | {need * 1e3:.1f} | {took * 1e3:.1f} | {took / need:.2f} "
                f"| {mib:.1f} | {sync * 1e3:.1f} | {async_ * 1e3:.1f} | {async_ / sync:.2f} |"
            )
    by_turn = "\n".join(lines)
    by_run = "\n".join(rows)
    text = f"""# What the loop costs

`make bench` measured this with a digits UNet {cfg.channels}, batch {cfg.batch}, on {device}, torch
{torch.__version__}. Times are medians of {cfg.rounds} interleaved rounds.

## One update
An update also draws its noise, takes an Adam step, updates the average of the student's weights and checks the
gradient. The ratio is its time over that of its bare network passes. Peak memory on a CPU is that of the whole process,
most of it torch and diffusers themselves. On a GPU it is that of CUDA's allocator. The passes are:
n, forward without gradient; f, forward and full backward; i, forward and backward to the input of a frozen network;
c before one of these, only as far as the features of the discriminator and through its heads; j, a forward-mode
derivative; 2, on real and generated images together.

{by_turn}

## A run
A step updates every player once, each with two micro-batches of {cfg.batch}. The run logs every 10 steps and writes a
checkpoint in the background every 50. The ratio is the time of {cfg.blocks} x 50 steps over that of their bare passes;
on a CPU the thread that writes counts too. The stall is how long training waits for a checkpoint (wall time): with
`checkpoint.save`, which writes it, and with `checkpoint.Saver`, which copies it.

{by_run}
"""
    sys.stdout.write(text)
    if cfg.output is not None:
        cfg.output.parent.mkdir(exist_ok=True)
        cfg.output.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Bench, use_underscores=True, description=__doc__))
