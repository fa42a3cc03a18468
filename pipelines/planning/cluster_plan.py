"""Memory, communication and time of a step on 8, 64 and 512 GPUs: arithmetic, not a measurement. No GPU was used.

    python -m pipelines.scaling                                                  the tables of docs/scaling.md
    python -m pipelines.scaling recipes/dmd2_sdxl.py --gpus 16 --machine.share 0.3 [-- flags of the recipe]

FLOPs, gathered parameters and reduced gradients are counted by running the method's losses on the meta device. Time is
these numbers divided by a machine's rates: from data sheets, and three assumptions that are flags.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from distill.configuration import fail
from distill.layout import program_name
from distill.networks.lora import LoRA
from distill.training.config import FakeConfig
from distill.training.step import BUCKET
from pipelines.planning.command import METHODS, Plan, resolve_config
from pipelines.planning.hours import CHIPS, TFLOP
from pipelines.planning.memory_plan import Bytes, GiB, Run, RunConfig
from pipelines.planning.table import Table
from pipelines.planning.variants import RANK, with_lora

if TYPE_CHECKING:
    from pipelines.planning.models import Meta


@dataclass(frozen=True)
class Machine:
    """GPUs and their network, with the values of a DGX H100."""

    peak: float = CHIPS["H100 SXM"].peak  # TFLOP/s, dense bfloat16 (NVIDIA H100 data sheet: half of the sparse value)
    memory: float = 80.0  # GiB of memory per GPU (data sheet: 80 GB)
    hbm: float = 3350.0  # memory bandwidth in GB/s (data sheet)
    nvlink: float = 450.0  # NVLink bandwidth in GB/s per direction (data sheet: 900 in both)
    network: float = 50.0  # GB/s per direction and GPU: one 400 Gb/s InfiniBand port each (DGX H100 data sheet)
    node: int = 8  # GPUs per node (DGX H100 data sheet)
    reserve: float = 1.0  # GiB for driver, libraries and allocator gaps: assumed, as in plan
    share: float = 0.4  # fraction of the peak that a run reaches: assumed
    wire: float = 0.8  # fraction of the network bandwidth that a run reaches: assumed
    hop: float = 3e-6  # latency of one hop of a ring in seconds: assumed

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (name not in ("reserve", "hop") and not value):
                raise ValueError(f"machine.{name} is {value}; it must be above 0")

    def ring_speed(self, gpus: int) -> float:
        """Bytes per second of a ring through `gpus` GPUs. Across nodes, eight rings use eight ports."""
        return 1e9 * self.wire * (self.nvlink if gpus <= self.node else min(self.nvlink, self.node * self.network))


@dataclass(frozen=True)
class Scaling:
    """The recipe, the numbers of GPUs and the machine of the tables."""

    recipe: Annotated[Path | None, tyro.conf.Positional] = None  # a recipe's name or file; None: docs/scaling.md
    gpus: tuple[int, ...] = (8, 64, 512)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        if min(self.gpus, default=0) < 2:
            raise ValueError(f"gpus is {self.gpus}; each must be at least 2")


@dataclass(frozen=True)
class Layout:
    """A run on GPUs that each hold 1 / `shards` of the state: 1 is DDP, more is FSDP2, replicated gpus / shards times.

    one: the run with a batch of one sample on one GPU. All counts are proportional to the batch.
    """

    one: Run
    machine: Machine
    batch: int  # batch size of the recipe
    gpus: int
    shards: int = 1
    micro: int = 1

    @property
    def global_batch(self) -> int:
        """The global batch size: the recipe's, or the smallest one with a sample for each GPU."""
        return max(self.batch, self.gpus)

    @property
    def rounds(self) -> int:
        return self.global_batch // self.gpus // self.micro

    @cached_property
    def memory(self) -> Bytes:
        run = self.one.on_gpus(self.gpus, self.shards)
        return replace(run.state, activations=self.micro * run.cost.activations)

    @property
    def fits(self) -> bool:
        return self.memory.total <= (self.machine.memory - self.machine.reserve) * GiB

    @property
    def flops(self) -> float:
        """FLOPs of a step on each GPU."""
        return self.one.cost.flops * self.rounds * self.micro

    @cached_property
    def transfers(self) -> list[tuple[float, float, float]]:
        """(bytes that each GPU sends, bytes per second, seconds of latency) in a step, for each kind of transfer."""
        m = self.machine
        s = self.shards
        copies = self.gpus // self.shards
        if s == 1:  # one all-reduce of each player's gradients after its micro-batches
            turns = [(n, every) for _, n, every in list_updates(self.one)]
            around = 2 * (self.gpus - 1)
            buckets = sum(-(-n // BUCKET) / every for n, every in turns)
            size = sum(4 * n / every for n, every in turns)
            return [(around / self.gpus * size, m.ring_speed(self.gpus), buckets * around * m.hop)]
        traffic = self.one.cost.traffic
        part = (s - 1) / s
        size = part * self.rounds * (2 * traffic.gathered + 4 * traffic.reduced)
        found = [(size, m.ring_speed(s), self.rounds * traffic.collectives * (s - 1) * m.hop)]
        if copies > 1:  # each GPU's part of the gradients, with its copies on other nodes, through its own port
            size = 2 * (copies - 1) / copies * self.rounds * 4 * traffic.reduced / s
            found.append((size, 1e9 * m.wire * m.network, 0.0))
        return found

    @property
    def compute(self) -> float:
        """Seconds for the FLOPs, and for AdamW, which reads four and writes three float32 numbers per weight."""
        m = self.machine
        updated = sum(7 * 4 * n / every for _, n, every in list_updates(self.one)) / self.shards
        return self.flops / (m.peak * TFLOP * m.share) + updated / (1e9 * m.hbm)

    @property
    def communication(self) -> float:
        return sum(size / speed + late for size, speed, late in self.transfers)

    @property
    def overlap(self) -> float:
        """Seconds of communication during computation: at best all of FSDP2's, none of our all-reduce."""
        return min(self.communication, self.compute) if self.shards > 1 else 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.communication - self.overlap

    @property
    def limit(self) -> str:
        if self.communication <= self.compute:
            return "compute"
        ring, *across = (size / speed + late for size, speed, late in self.transfers)
        inside = (self.gpus if self.shards == 1 else self.shards) <= self.machine.node
        return "NVLink" if inside and ring >= sum(across) else "network"

    @property
    def mode(self) -> str:
        if self.shards == 1:
            return "DDP"
        return f"FSDP2 {self.shards}" + (f" x {self.gpus // self.shards}" if self.gpus > self.shards else "")


def list_updates(run: Run) -> list[tuple[str, int, int]]:
    """(player, number of its trained parameters, steps between its updates) of each update."""
    from pipelines.planning.flop_counter import players

    owners = players(run.networks[2])
    updates = run.config.method.updates()
    return [(u.player, sum(p.numel() for p in owners[u.player]), u.every) for u in updates]


def layouts(one: Run, batch: int, gpus: int, machine: Machine) -> Iterator[Layout]:
    """DDP, and the FSDP2 with the fewest shards (at least one node's) that fits, each with the largest micro-batch."""
    parts = [p for p in (machine.node * 2**i for i in range(20)) if p <= gpus and gpus % p == 0] or [gpus]
    for group in ([1], parts):
        found = Layout(one, machine, batch, gpus, group[-1])
        for shards in group:
            each = max(batch, gpus) // gpus
            sizes = [n for n in range(each, 0, -1) if each % n == 0]
            every = [Layout(one, machine, batch, gpus, shards, micro) for micro in sizes]
            if fitting := [layout for layout in every if layout.fits]:
                found = fitting[0]
                break
        yield found


def cases(scaling: Scaling, flags: list[str]) -> Iterator[tuple[str, RunConfig, Meta]]:
    """(name, configuration, configs of the teacher): the recipe, or SDXL, FLUX and Qwen-Image."""
    if scaling.recipe is not None:
        yield scaling.recipe.stem, *resolve_config(Plan(scaling.recipe), flags)
        return
    recipe = lambda name: resolve_config(Plan(Path(name)), flags)
    yield "SDXL DMD2", *recipe("dmd2_sdxl")
    yield "SDXL DMD2, LoRA student", *recipe("dmd2_sdxl_lora")
    yield "SDXL SiD", *recipe("sid_sdxl")
    flux, parts = recipe("dmd2_flux")
    train = replace(flux.train, output_dir="runs/dmd2_qwen")
    qwen, others = resolve_config(Plan(family="qwen", method="dmd2-prompts"), [])
    qwen = replace(with_lora(qwen, others, RANK, True), train=train)  # there is no recipe: batch and steps of FLUX
    for name, config, meta in (("FLUX", flux, parts), ("Qwen-Image", qwen, others)):
        full = replace(config, student=replace(config.student, lora=LoRA()), fake=FakeConfig())
        yield f"{name} DMD2", full, meta
        yield f"{name} DMD2, LoRA", config, meta
        yield f"{name} SiD, LoRA", replace(config, method=METHODS["sid"].method), meta


def tables(scaling: Scaling, flags: list[str]) -> str:
    """Tables of the memory per GPU in every layout, and of the time per step in those that fit."""
    names = list(Bytes.__dataclass_fields__)
    memory = [["GiB on each GPU", "GPUs", "mode", "micro", *names, "total", "fits"]]
    time = [["a step", "GPUs", "mode", "batch", "TFLOP", "GB sent", "compute s", "sent s", "hidden s", "step s"]]
    time[0] += ["limit", "GPU hours"]
    for name, config, parts in cases(scaling, flags):
        train = replace(config.train, train_batch_size=1, gradient_accumulation_steps=1)
        one = Run(replace(config, train=train), parts)
        for gpus in scaling.gpus:
            batch = config.train.train_batch_size
            if max(batch, gpus) % gpus:
                raise ValueError(f"train_batch_size {batch} of {name} is not a multiple of {gpus} GPUs")
            for run in layouts(one, batch, gpus, scaling.machine):
                sizes = [getattr(run.memory, n) for n in names]
                row = [name, f"{gpus}", run.mode]
                cells = [f"{size / GiB:.1f}" for size in (*sizes, run.memory.total)]
                memory.append([*row, f"{run.micro}", *cells, "yes" if run.fits else "no"])
                if run.fits:
                    sent = sum(size for size, _, _ in run.transfers) / 1e9
                    spent = [run.compute, run.communication, run.overlap, run.seconds]
                    hours = run.seconds * gpus * train.max_train_steps / 3600
                    row += [
                        f"{run.global_batch}{'*' if run.global_batch > batch else ''}",
                        f"{run.flops / TFLOP:.0f}",
                        f"{sent:.1f}",
                    ]
                    time.append([*row, *(f"{s:.2f}" for s in spent), run.limit, f"{hours:,.0f}"])
    return f"{Table(memory)}\n{Table(time)}"


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    try:
        scaling = tyro.cli(Scaling, args=argv[:split], description=__doc__, use_underscores=True, prog=program_name())
        text = tables(scaling, argv[split + 1 :])
    except (ValueError, OSError) as error:
        fail(str(error))
    sys.stdout.write(text)
