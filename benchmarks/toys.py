"""Toy science: SiD, DMD2, VSD, CD and sCM on every schedule distil an exact two-dimensional teacher to one step.

    make toys                                                         all runs; writes docs/toys.md and docs/toys.json
    .venv/bin/python benchmarks/toys.py --method SCM --problem grid   some of them; the other rows stay

The teacher is the closed-form denoiser of a Gaussian mixture, so the only errors are those of the method, of its
settings and of a small student. Student and fake score start from a network that was regressed on the teacher.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.schedule import EDM, VP, Flow, Schedule, Trig
from distill.diffusion.times import Karras, LogNormal
from distill.method import Method
from distill.methods import DMD2, LCD, SCM, VSD, SiD
from distill.random import Draw
from distill.roles import Batch
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train

DOCS = Path(__file__).resolve().parent.parent / "docs"
EVALUATE = 5000  # samples on each side of every figure
TRAIN_SEED = 0
EVALUATION_SEED = 1234


# --- problems -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Equally likely isotropic Gaussians in the plane; both problems have standard deviation 1 per coordinate."""

    means: tuple[tuple[float, float], ...]
    std: float  # of every mode

    @property
    def centres(self) -> Tensor:
        return torch.tensor(self.means)  # [K, 2]

    def sample(self, n: int, seed: int) -> Tensor:
        """[n, 2] from a generator of its own."""
        g = torch.Generator().manual_seed(seed)
        mode = torch.randint(len(self.means), (n,), generator=g)
        return self.centres[mode] + self.std * torch.randn(n, 2, generator=g)

    def data(self, draw: Draw) -> Batch:
        """The batch of a training step."""
        mode = draw.integers("mode", len(self.means))
        return {"real": self.centres[mode] + self.std * draw.normal("within", (len(mode), 2))}

    def near(self, x: Tensor) -> Tensor:
        """Which mode each sample [n, 2] lies within 3 std of; -1 for none. The modes are over 6 std apart."""
        distance, mode = torch.cdist(x, self.centres).min(1)
        return torch.where(distance < 3 * self.std, mode, -1)

    def covered(self, x: Tensor) -> int:
        """Modes that hold, within 3 std, at least a quarter of their fair share 1/K of all samples."""
        near = self.near(x)
        count = torch.bincount(near[near >= 0], minlength=len(self.means))
        return int((count >= len(x) / len(self.means) / 4).sum())

    def quality(self, x: Tensor) -> float:
        """Share of the samples within 3 std of any mode (the mixture itself: .989)."""
        return float((self.near(x) >= 0).float().mean())


class Exact(nn.Module):
    """E[x0 | x0 + sigma eps = x] of a mixture, [B, 2] and sigma [B] -> [B, 2]: a teacher without parameters."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.var = mixture.std**2
        self.register_buffer("centres", mixture.centres)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        noise = sigma.to(x.dtype)[:, None] ** 2
        centres = self.centres.to(x.dtype)
        which = ((x @ centres.T - centres.square().sum(1) / 2) / (self.var + noise)).softmax(1)
        return (self.var * x + noise * (which @ centres)) / (self.var + noise)


def energy(x: Tensor, y: Tensor) -> float:
    """Squared energy distance 2 E|x - y| - E|x - x'| - E|y - y'| of two samples [n, 2]; 0 only for the same sample."""

    def mean(a: Tensor, b: Tensor) -> float:
        return sum(torch.cdist(rows, b).double().sum() for rows in a.split(500)).item() / (len(a) * len(b))

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


RING = tuple((1.41 * math.cos(k * math.pi / 4), 1.41 * math.sin(k * math.pi / 4)) for k in range(8))
GRID = tuple((0.707 * i, 0.707 * j) for i in range(-2, 3) for j in range(-2, 3))
PROBLEMS = {"ring": Mixture(RING, 0.10), "grid": Mixture(GRID, 0.07)}


# --- schedules and networks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """A schedule, the kind of prediction of its networks, and how they are called."""

    schedule: Schedule
    kind: str
    level: Callable[[Tensor], Tensor]  # native time -> what the network sees of it, of order 1 and smooth

    def call(self, net: nn.Module, x: Tensor, native: Tensor, c: Condition) -> Tensor:
        """Only EDM's input needs scaling to about unit variance; on the other schedules it is so already."""
        if isinstance(self.schedule, EDM):
            x = x / (1 + native.to(x.dtype) ** 2).sqrt()[:, None]
        return net(x, self.level(native).to(x.dtype))


# VP's root: the first tenth of the table holds all noise below the distance between modes.
SPACES = {
    "VP":     Space(VP.scaled_linear(), "v",    lambda n: ((1 + n) / 1000).sqrt()),
    "VP-eps": Space(VP.scaled_linear(), "eps",  lambda n: ((1 + n) / 1000).sqrt()),
    "EDM":    Space(EDM(),              "edm",  lambda sigma: sigma.log() / 4),
    "Flow":   Space(Flow(),             "flow", lambda t: t / 1000),
    "Trig":   Space(Trig(1.0),          "v",    lambda theta: theta / (math.pi / 2)),
}  # fmt: skip


class MLP(nn.Module):
    """Three layers of 96 SiLU units over x [B, 2], the level [B] and Fourier features of both.

    Those of x resolve the modes; those of the level are of low frequency, for sCM differentiates in time.
    """

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.register_buffer("place", math.pi * torch.tensor([1.0, 2.0]))
        self.register_buffer("level", math.pi * torch.tensor([0.5, 1.0, 2.0]))
        sizes = [2 + 4 * len(self.place) + 2 * len(self.level), width, width, width]
        layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.SiLU())]
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        place = (x[:, :, None] * self.place).flatten(1)
        level = level[:, None] * self.level
        return self.out(self.body(torch.cat([x, place.sin(), place.cos(), level.sin(), level.cos()], 1)))


def exact(problem: str, schedule: str) -> Denoiser:
    """The teacher: written once for alpha = 1, and spoken to on `schedule`."""
    return Denoiser(Exact(PROBLEMS[problem]), EDM(), "x0").on_schedule(SPACES[schedule].schedule)


@cache
def pretrained(problem: str, schedule: str, steps: int = 1500, batch: int = 256) -> Denoiser:
    """A network regressed on the exact denoiser, in its own prediction space; shared by all methods."""
    torch.manual_seed(TRAIN_SEED)
    mixture = PROBLEMS[problem]
    space = SPACES[schedule]
    teacher = exact(problem, schedule)
    net = MLP()
    denoiser = Denoiser(net, space.schedule, space.kind, space.call, sigma_d=1.0)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
    data = mixture.sample(steps * batch, TRAIN_SEED).split(batch)
    for step, x in enumerate(data):
        t = space.schedule.time((-0.7 + 1.5 * torch.randn(batch, dtype=torch.float64)).exp())
        x_t = space.schedule.diffuse(x, torch.randn_like(x), t)
        truth = teacher(x_t, t)
        pred = denoiser(x_t, t)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        functional.mse_loss(pred.out, pred.target(truth.x0, truth.eps)).backward()
        optimizer.step()
    return denoiser


# --- methods --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How a method is trained: Adam (0, .999), batch 256, learning rates falling to 0 over the last half."""

    method: Method
    ring: int  # iterations of the loop
    grid: int
    lr: float  # of the student
    fake_lr: float | None  # of the fake score and the critic
    modes: int  # of the grid's 25 that it is to cover (of the ring: all 8)


# LOOK   where the student of a score method is judged; FAKE, where its fake score learns: around the distance between
#        modes, 0.7; WORK, the same for sCM. All in sigma / alpha, so they mean the same on every schedule.
# SiD    alpha 1: above it a student that is too wide gets wider (see the closed forms).
# DMD2   five fake steps; on Flow without the GAN 19 or 20 of the grid's modes, with it 22 to 25 over its weights (on
#        EDM 25 at weight .5 and 22 at 1, on Flow 24 and 25). The critic looks below sigma 2, where modes are apart.
# VSD    two fake steps to a student step: with one 18 of the grid's modes on Flow, with two 24.
# LCD    20, 30 and 40 Heun steps did equally well; without the averaged target hq fell from .63 to .47.
# SCM    r grows over 500 steps.
# Students of score methods take half the fake's rate or less; consistency has no fake to wait for.
LOOK = Karras(0.05, 20.0)
FAKE = LogNormal(-0.7, 1.3)
WORK = LogNormal(-0.4, 1.3)
GAN = dict(gan=0.5, gan_fake=0.2, gan_times=Karras(0.05, 2.0), taps=("body",))
SETTINGS = {
    #                                                                        ring  grid   lr  fake_lr  modes
    "SiD":  Setting(SiD(1.0, times=LOOK, fake_times=FAKE),                   1500, 2000, 5e-4, 1e-3, 18),
    "DMD2": Setting(DMD2(every=5, times=LOOK, fake_times=FAKE, **GAN),       2000, 4000, 5e-4, 1e-3, 23),
    "VSD":  Setting(VSD(1.0, fake_steps=2, times=LOOK, fake_times=FAKE),     3000, 3000, 5e-4, 1e-3, 18),
    "LCD":  Setting(LCD(30, solver="heun"),                                  1500, 3000, 1e-3, None, 23),
    "SCM":  Setting(SCM(1.0, sigma_d=1.0, times=WORK, warmup=500),           1500, 2000, 1e-3, None, 23),
}  # fmt: skip
SIGMA = 2.5  # level of the student's only call: 2.5 times the data's standard deviation


def run(
    problem: str,
    method: str,
    schedule: str,
    steps: int | None = None,
    warm: int = 1500,
    tick: Callable[[], object] = lambda: None,
) -> dict:
    """Distil the exact teacher to one step; the student before and after, as a row of the table.

    steps: of the loop, None: the table's; warm: of the regression before it; tick: called after every step.
    """
    torch.set_num_threads(1)
    mixture = PROBLEMS[problem]
    setting = SETTINGS[method]
    start = pretrained(problem, schedule, warm)
    cfg = TrainConfig(
        max_train_steps=steps or getattr(setting, problem),
        train_batch_size=256,
        learning_rate=setting.lr,
        fake_learning_rate=setting.fake_lr,
        lr_scheduler="linear",
        ema_half_life=20_000,
        seed=TRAIN_SEED,
    )
    torch.manual_seed(TRAIN_SEED)  # of the critic's weights
    nets = build(setting.method, start.copy(), (2,), student=StudentConfig(sigma=SIGMA))
    nets.teacher = exact(problem, schedule)
    z = torch.randn(EVALUATE, 2, generator=torch.Generator().manual_seed(EVALUATION_SEED))
    real = mixture.sample(EVALUATE, EVALUATION_SEED + 1)

    @torch.no_grad()
    def samples(net: nn.Module) -> Tensor:
        return replace(nets.student, denoiser=replace(nets.student.denoiser, net=net)).generate(z, None)

    before = energy(samples(nets.student.denoiser.net), real)
    clock = time.process_time()
    for state in train(setting.method, nets, mixture.data, cfg, Accelerator(cpu=True)):  # noqa: B007
        tick()
    seconds = time.process_time() - clock
    x = samples(state.ema.net)
    after = energy(x, real)
    return {
        "problem": problem,
        "method": method,
        "schedule": schedule,
        "kind": SPACES[schedule].kind,
        "steps": cfg.max_train_steps,
        "before": before,
        "after": after,
        "factor": before / after,
        "modes": mixture.covered(x),
        "hq": mixture.quality(x),
        "seconds": seconds,  # of CPU, one thread
    }


# --- the page -------------------------------------------------------------------------------------------------------


def floor(problem: str) -> list[dict]:
    """What the figures are for the mixture itself, and for a featureless square of the same standard deviation."""
    mixture = PROBLEMS[problem]
    real = mixture.sample(EVALUATE, EVALUATION_SEED + 1)
    g = torch.Generator().manual_seed(EVALUATION_SEED)
    square = (2 * torch.rand(EVALUATE, 2, generator=g) - 1) * 3**0.5
    rows = {"the mixture, other samples": mixture.sample(EVALUATE, EVALUATION_SEED + 2), "a uniform square": square}
    return [
        {
            "problem": problem,
            "of": name,
            "energy": energy(x, real),
            "modes": mixture.covered(x),
            "hq": mixture.quality(x),
        }
        for name, x in rows.items()
    ]


def goal(row: dict) -> int:
    """The number of modes that a row is to cover."""
    return 8 if row["problem"] == "ring" else SETTINGS[row["method"]].modes


def page(rows: list[dict], floors: list[dict]) -> str:
    """docs/toys.md."""
    missed = [r for r in rows if r["modes"] < goal(r)]
    minutes = sum(r["seconds"] for r in rows) / 60
    lines = [
        "# Toys: SiD, DMD2, VSD, CD and sCM on every schedule",
        "",
        f"    make toys        # {minutes:.0f} CPU minutes of training, one thread; writes this page and toys.json",
        "",
        "Two mixtures in the plane, of standard deviation 1: a **ring** of 8 modes (std 0.10) and a **grid** of 25",
        "(std 0.07, 0.707 apart). The teacher is the exact denoiser in closed form; student and fake score start from",
        "a small network (three layers of 96) regressed on it. Each row is one training to a one-step student, one",
        "seed, with its method's settings in `benchmarks/toys.py`, the same on every schedule and prediction kind.",
        "The settings were chosen on these same runs; other settings of DMD2 covered 17 to 25 modes of the grid.",
        "",
        f"- **before, after**: squared energy distance 2 E|x - y| - E|x - x'| - E|y - y'| of {EVALUATE} samples of the",
        "  student (noise not seen in training) to as many of the mixture; **factor** is their quotient.",
        "- **modes**: covered is a mode that holds, within 3 std, at least a quarter of its fair share of all samples.",
        "  Goals: 8 on the ring; on the grid 23 for DMD2, LCD, SCM and 18 for SiD, VSD.",
        "- **hq**: share of the samples within 3 std of any mode. One network call is a continuous map and must bridge",
        "  the modes, so .99 is out of reach; coverage counts only together with an hq above a featureless square's,",
        "  for the energy distance hardly sees the modes of the grid: a square of the same spread scores as well.",
        "- **seconds** of CPU, one thread, the distillation alone.",
        "",
        "| for scale | | energy distance | modes | hq |",
        "|---|---|---|---|---|",
        *(f"| {f['problem']} | {f['of']} | {f['energy']:.4f} | {f['modes']} | {f['hq']:.3f} |" for f in floors),
        "",
        "| problem | method | schedule | kind | before | after | factor | modes | hq | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['problem']} | {r['method']} | {r['schedule'].split('-')[0]} | {r['kind']} | {r['before']:.3f} "
            f"| {r['after']:.4f} | {r['factor']:.0f} | {r['modes']}{'' if r['modes'] >= goal(r) else ' (goal missed)'} "
            f"| {r['hq']:.2f} | {r['seconds']:.0f} |"
            for r in rows
        ),
        "",
        f"{len(rows) - len(missed)} of {len(rows)} runs cover the modes they are to cover"
        + (": all." if not missed else "; missed: ")
        + ", ".join(f"{r['method']} on {r['schedule']} ({r['problem']}, {r['modes']} of {goal(r)})" for r in missed)
        + ("." if missed else ""),
        "",
    ]
    return "\n".join(lines)


def main(
    problem: Literal["ring", "grid"] | None = None,
    method: Literal["SiD", "DMD2", "VSD", "LCD", "SCM"] | None = None,
    schedule: Literal["VP", "VP-eps", "EDM", "Flow", "Trig"] | None = None,
) -> None:
    """Run the toys, or those that a flag picks out, and write docs/toys.md and docs/toys.json; other rows stay."""
    chosen = [
        (p, m, s)
        for p in PROBLEMS
        for m in SETTINGS
        for s in SPACES
        if problem in (None, p) and method in (None, m) and schedule in (None, s)
    ]
    stored = DOCS / "toys.json"
    old = json.loads(stored.read_text())["rows"] if stored.exists() else []
    rows = {(r["problem"], r["method"], r["schedule"]): r for r in old}
    with tqdm(total=sum(getattr(SETTINGS[m], p) for p, m, _ in chosen), unit="step", mininterval=1) as bar:
        for i, (p, m, s) in enumerate(chosen):
            bar.set_description(f"{i + 1} of {len(chosen)}: {p} {m} {s}")
            rows[p, m, s] = r = run(p, m, s, tick=bar.update)
            bar.write(
                f"{p} {m:4} {s:6} energy distance {r['before']:.3f} -> {r['after']:.4f} (factor {r['factor']:.0f}), "
                f"modes {r['modes']}, hq {r['hq']:.2f}, {r['seconds']:.0f} s"
            )
    ordered = [rows[p, m, s] for p in PROBLEMS for m in SETTINGS for s in SPACES if (p, m, s) in rows]
    floors = [f for p in PROBLEMS for f in floor(p)]
    DOCS.mkdir(exist_ok=True)
    stored.write_text(json.dumps({"rows": ordered, "floors": floors}, indent=1) + "\n")
    (DOCS / "toys.md").write_text(page(ordered, floors))
    print(f"written: {DOCS / 'toys.md'}")


if __name__ == "__main__":
    tyro.cli(main)
