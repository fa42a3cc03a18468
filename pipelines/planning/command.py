"""Does a run fit, and how long does it take: parameters, bytes, disk space and hours, before any download.

    python -m pipelines.plan recipes/dmd2_sdxl.py --gpus 8 --memory 80 -- --method.guidance 7
    python -m pipelines.plan recipes/dmd2_sdxl.py --config_file recipes/accelerate/gpu8_fsdp2.yaml
    python -m pipelines.plan --family flux --method dmd2 --lora 64 --gpus 8

The last lines are a launch line that fits and its hours. If the run does not fit as it is, it is the one with the least
change, and the exit status is 1. Flags of the recipe follow after --.

Roles are built by the training code from public configs on the meta device, and the method's losses run there. Weights,
gradients and optimizer state are exact, FLOPs are counted, activations are estimated. No GPU is used.
"""

from __future__ import annotations

import math
import runpy
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from distill import methods
from distill.configuration import Config, fail, parse
from distill.data import Digits, Text
from distill.layout import find_recipe, module_name, program_name, recipe_names
from distill.method import Method, Requirement
from distill.networks.lora import LoRA
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from pipelines import fields
from pipelines.planning.hours import CHIPS, SHARES, TFLOP, find_published, gpu_hours
from pipelines.planning.launch_line import format_launch, read_launch_file, recipe_program
from pipelines.planning.memory_plan import Bytes, GiB, Run, RunConfig
from pipelines.planning.micro_batch import with_micro_batch
from pipelines.planning.nearest import nearest_name
from pipelines.planning.table import Table
from pipelines.planning.variants import NODE, RANK, apply_24gb_preset, find_fitting, what_counts, with_lora

if TYPE_CHECKING:
    from pipelines.planning.models import Meta


class MethodChoice(NamedTuple):
    """A method of --method. flags: those of recipes.train that make it."""

    method: Method
    flags: str


METHODS = {
    "dmd2": MethodChoice(methods.DMD2(guidance=8.0), "--method dmd2 --method.guidance 8"),
    "dmd2-prompts": MethodChoice(
        methods.DMD2(guidance=8.0, gan=0.0, gan_fake=0.0),
        "--method dmd2 --method.guidance 8 --method.gan 0 --method.gan_fake 0",
    ),
    "sid": MethodChoice(methods.SiD(kappa=(1.5, 1.5, 1.5, 1.5)), "--method sid --method.kappa 1.5 1.5 1.5 1.5"),
    "vsd": MethodChoice(methods.VSD(), "--method vsd"),
    "lcd": MethodChoice(
        methods.LCD(guidance=7.5, target_ema=0.0), "--method lcd --method.guidance 7.5 --method.target_ema 0"
    ),
    "scm": MethodChoice(methods.SCM(guidance=4.5), "--method scm --method.guidance 4.5"),
}


@dataclass(frozen=True)
class MachineOptions:
    """GPUs, and how the run is launched on them."""

    config_file: Path | None = None  # accelerate's configuration file: number of GPUs, sharding, precision
    gpus: int | None = None  # number of GPUs; None: that of config_file, or 1
    memory: float = 80.0  # GiB per GPU
    reserve: float = 1.0  # GiB of it for driver, libraries and allocator gaps
    mixed_precision: Literal["bf16", "no"] | None = None  # None: that of config_file, or bf16
    share: float | None = None  # fraction of the matrix peak that the run reaches; None: those of published runs

    @property
    def limit(self) -> float:
        """Bytes of a GPU that a run may use."""
        return (self.memory - self.reserve) * GiB


@dataclass(frozen=True)
class DiskOptions:
    """The size of the cache, for the table of the disk."""

    prompts: int = 500_000  # number of prompts in the cache
    images: int = 500_000  # number of images in the cache, if the method needs real images


@dataclass(frozen=True)
class Plan:
    """The run to plan, the machine and the disk."""

    recipe: Annotated[Path | None, tyro.conf.Positional] = None  # a recipe's name or file; its own flags follow --
    family: str | None = None  # teacher, without a recipe: sd15, sdxl, sd3, flux, qwen, sana, wan, ..., or a Hub name
    method: Literal["dmd2", "dmd2-prompts", "sid", "vsd", "lcd", "scm"] = "dmd2"  # method, without a recipe
    lora: int | None = None  # rank of the adapters of student and fake score; None: the recipe's, or full copies
    preset: Literal["24gb"] | None = None  # one GPU of 24 GB: 22 GiB, adapters on a bfloat16 backbone, prompts only
    machine: Annotated[MachineOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=MachineOptions)
    disk: Annotated[DiskOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DiskOptions)

    def validate(self) -> None:
        """ValueError for options that no run has. tyro would frame the errors of __post_init__."""
        if (self.recipe is None) == (self.family is None):
            raise ValueError("give either a recipe (recipes/dmd2_sdxl.py) or --family and --method")
        machine = self.machine
        values = {"gpus": machine.gpus, "memory": machine.memory, "share": machine.share, "prompts": self.disk.prompts}
        for name, value in values.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")


class Launch(NamedTuple):
    """What the options and the configuration file of accelerate say together."""

    gpus: int
    shards: int
    half: bool


def resolve_launch(options: MachineOptions) -> Launch:
    if options.config_file is None:
        return Launch(options.gpus or 1, 1, options.mixed_precision != "no")
    file = read_launch_file(options.config_file)
    gpus = options.gpus or file.processes
    shards = min(file.shards, gpus)
    if gpus % shards:
        raise ValueError(f"{options.config_file} has {file.shards} shards, and {gpus} GPUs are no multiple of it")
    return Launch(gpus, shards, (options.mixed_precision or file.mixed_precision) == "bf16")


def resolve_config(plan: Plan, flags: list[str]) -> tuple[RunConfig, Meta]:
    """The configuration of a recipe or family, with the plan's options applied, and its teacher's configs."""
    config, parts = _from_family(plan) if plan.recipe is None else _from_recipe(plan.recipe, flags)
    if plan.lora is not None or plan.preset is not None:
        config = with_lora(config, parts, plan.lora or RANK, True)
    if plan.preset == "24gb":
        config = apply_24gb_preset(config, parts)
    return config, parts


def _from_recipe(recipe: Path, flags: list[str]) -> tuple[RunConfig, Meta]:
    from pipelines.planning.models import MODELS, Meta, find_model

    config = parse(*load_recipe_config(recipe, flags), f"flags of {recipe}")
    if config.student.network is not None:
        fields.read(Path(config.student.network) / "config.json")
    if config.teacher and Path(config.teacher).is_dir():
        return config, Meta.from_folder(Path(config.teacher))
    name = recipe.stem.rpartition("_")[2]
    if not config.teacher and name in MODELS:  # recipes on a converted checkpoint name no teacher
        return config, Meta(MODELS[name])
    return config, Meta(find_model(config.teacher, "teacher"))


def _from_family(plan: Plan) -> tuple[RunConfig, Meta]:
    from pipelines.planning.models import Meta, find_model

    assert plan.family is not None
    model = find_model(plan.family, "family")
    steps = 4 if plan.method.startswith("dmd2") else 1
    batch = resolve_launch(plan.machine).gpus
    train = TrainConfig(train_batch_size=batch, max_train_steps=10_000, ema_half_life=0)
    method = METHODS[plan.method].method
    return Config(method, Digits(), model.hub, student=StudentConfig(steps=steps), train=train), Meta(model)


def format_program(plan: Plan, config: RunConfig, flags: list[str]) -> list[str]:
    """The words that start the run after `accelerate launch`: the recipe and its flags."""
    train = config.train
    if plan.recipe is not None:
        words = [*recipe_program(f"{plan.recipe}"), *flags]
        if isinstance(config.data, Text) and config.data.text == "cached" and not config.data.cache:
            words += ["--data.cache", "cache"]
    else:
        words = ["-m", module_name("recipes.train"), *METHODS[plan.method].flags.split(), "--teacher", config.teacher]
        words += ["--student.steps", f"{config.student.steps}", "--train_batch_size", f"{train.train_batch_size}"]
        words += ["--max_train_steps", f"{train.max_train_steps}", "--ema_half_life", "0"]
    if plan.lora is not None or plan.preset is not None:
        words += ["--student.lora.rank", f"{plan.lora or RANK}"]
        words += ["--fake.lora.rank", f"{plan.lora or RANK}"] if "fake" in config.method.roles else []
    if plan.preset is not None:
        words += ["--gradient_checkpointing"]
        if plan.recipe is not None:
            gan = isinstance(config.method, methods.DMD2)
            words += "--method.gan 0 --method.gan_fake 0".split() if gan else "--method.target_ema 0".split()
    return words


def load_recipe_config(recipe: Path, flags: list[str]) -> tuple[RunConfig, list[str]]:
    """(CONFIG of a recipe, from its file or its name, the flags).

    If the file has a function `resolve`, like recipes/train.py, it makes both from the flags.
    """
    script = find_recipe(f"{recipe}")
    if script is None:
        raise ValueError(
            f"no recipe at {f'{recipe}'!r}{nearest_name(recipe.stem, recipe_names())}: name a Python file with a "
            "Config named CONFIG, as in recipes/, or a recipe that `distill recipes` lists"
        )
    names = runpy.run_path(str(script))
    if "resolve" in names:
        return names["resolve"](flags)
    found = names.get("CONFIG")
    if not isinstance(found, Config):
        raise ValueError(f"{recipe} has no Config named CONFIG at its top level, as those in recipes/ do")
    return found, flags


def fits(run: Run, plan: Plan) -> bool:
    return (
        run.state.total <= plan.machine.limit and run.memory.total <= plan.machine.limit
    )  # counting activations takes time


def compare_memory(run: Run, plan: Plan) -> Table:
    """The memory of this configuration, and with full copies, adapters or sharded weights instead."""
    full = replace(run.config, student=replace(run.config.student, lora=LoRA()), fake=FakeConfig())
    lora = with_lora(run.config, run.parts, RANK, True)
    runs = {"this run": run}
    runs |= {} if full == run.config else {"full copies": replace(run, config=full)}
    runs |= {} if lora == run.config else {f"LoRA {RANK}": replace(run, config=lora)}
    if run.gpus > 1 and run.shards == 1:
        shards = min(run.gpus, NODE)
        runs[f"full copies, FSDP over {shards}"] = runs.get("full copies", run).on_gpus(run.gpus, shards)
    names = list(Bytes.__dataclass_fields__)
    rows = [["GiB on each GPU", *names, "total", "fits"]]
    for name, one in runs.items():
        found = one.memory
        sizes = [*(getattr(found, n) for n in names), found.total]
        rows.append([name, *(f"{size / GiB:.2f}" for size in sizes), "yes" if fits(one, plan) else "no"])
    return Table(rows)


def report(run: Run, plan: Plan) -> str:
    """The complete plan as text."""
    teacher, _, _ = run.networks
    train = run.config.train
    config = run.config
    precision = "bfloat16 autocast" if run.half else "float32"
    recompute = ", blocks recomputed" if train.gradient_checkpointing else ""
    sharding = f", state sharded over {run.shards}" if run.shards > 1 else ""
    lines = [
        f"{type(config.method).__name__} on {run.parts.model.hub}: samples {teacher.shape}, {run.gpus} GPU(s) of "
        f"{plan.machine.memory:g} GiB{sharding}; {train.rounds} micro-batch(es) of {run.micro} sample(s) on each GPU "
        f"in an update; {precision}{recompute}\n"
    ]
    roles = [["parameters", "all", "trained"]]
    roles += [[role, f"{n:,}", f"{trained:,}"] for role, (n, trained) in run.parameters.items()]
    lines += [str(Table(roles)), str(compare_memory(run, plan))]
    lines.append("  activations are an estimate (tensors alive in the run on the meta device); the rest is exact,")
    lines.append(f"  sharded rows divide it. {plan.machine.reserve:g} GiB of each GPU is kept free. No GPU was used.\n")
    judges = {
        Requirement.PERCEPTUAL_DISTANCE: "LPIPS and its decoder",
        Requirement.REWARD: "the reward and its decoder",
    }
    for requirement, judge in judges.items():
        if requirement in config.method.requirements:
            lines.append(f"  {judge} are left out, of memory and of FLOPs.\n")
    if getattr(config.data, "text", "cached") == "online":
        lines.append("  Text encoders and VAE, which online data keep in memory, are left out.\n")
    return "\n".join([*lines, str(disk_sizes(run, plan)), *tabulate_hours(run, plan)])


def disk_sizes(run: Run, plan: Plan) -> Table:
    """The disk space of caches, checkpoints and the export."""
    teacher, c, _ = run.networks
    train = run.config.train
    prompt = 2 * sum(s.numel() for s in c.values())
    rows = [
        ["disk", "GB"],
        [f"cache of {plan.disk.prompts:,} prompts, at most", f"{plan.disk.prompts * prompt / 1e9:.1f}"],
    ]
    if Requirement.REAL in run.config.method.requirements:
        image = 2 * math.prod(teacher.shape)
        rows.append([f"cache of {plan.disk.images:,} images", f"{plan.disk.images * image / 1e9:.1f}"])
    kept = (train.checkpoints_total_limit or train.max_train_steps // max(train.checkpointing_steps, 1)) + 1
    rows.append([f"{kept} checkpoints, one being written", f"{kept * run.checkpoint / 1e9:.1f}"])
    rows.append(["exported network", f"{4 * run.parameters['teacher'][0] / 1e9:.1f}"])
    return Table(rows)


def tabulate_hours(run: Run, plan: Plan) -> list[str]:
    """The FLOPs of the run, a table of its hours on every kind of GPU, and the hours of published runs."""
    train = run.config.train
    cost = run.cost
    sample = cost.flops / cost.micro / TFLOP
    line = (
        f"  {sample:.2f} TFLOP a sample and step (counted, averaged over {cost.cycle} steps), "
        f"{run.flops:.3g} FLOP for {train.max_train_steps:,} steps of {train.train_batch_size}\n"
    )
    rows = [[f"hours at {format_share(plan)} of the peak", "TFLOP/s", f"{run.gpus} GPU(s)", "GPU hours", "peak from"]]
    for name, chip in CHIPS.items():
        hours = gpu_hours(run.flops, name, plan.machine.share)
        rows.append([name, f"{chip.peak:g}", f"{hours.divide(run.gpus)}", f"{hours}", chip.source])
    lines = [line, str(Table(rows))]
    for published in find_published(plan.recipe.stem if plan.recipe else ""):
        variant = f", {published.variant}" if published.variant else ""
        lines.append(
            f"  published{variant}: {published.gpu_hours:,.0f} {published.chip} hours for {published.steps:,} steps of "
            f"{published.batch}, {published.peak_share:.1%} of the peak ({published.source})"
        )
    return lines + [""] * (len(lines) > 2)


def format_share(plan: Plan) -> str:
    """The share of the peak at which hours are computed, or the highest and the lowest of published runs."""
    return f"{plan.machine.share:.0%}" if plan.machine.share else f"{SHARES[1]:.0%} to {SHARES[0]:.0%}"


def summarize_hours(run: Run, plan: Plan) -> str:
    """The hours of a run on the chips with the least memory that is enough, and on eight H100."""
    enough = [name for name, chip in CHIPS.items() if chip.memory >= plan.machine.memory * 0.95]
    least = min((CHIPS[name].memory for name in enough), default=None)
    names = [name for name in enough if CHIPS[name].memory == least]
    hours = [
        f"{gpu_hours(run.flops, name, plan.machine.share).divide(run.gpus)} on {run.gpus} x {name}" for name in names
    ]
    return f"hours at {format_share(plan)} of the peak: {', '.join(hours) or 'no GPU with this memory is known'}"


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    try:
        plan = tyro.cli(Plan, args=argv[:split], description=__doc__, use_underscores=True, prog=program_name())
        plan.validate()
        if plan.preset == "24gb":
            small = replace(plan.machine, gpus=1, memory=min(plan.machine.memory, 22.0))
            plan = replace(plan, machine=small)
        flags = argv[split + 1 :]
        launch = resolve_launch(plan.machine)
        config, parts = resolve_config(plan, flags)
        asked = Run(config, parts, launch.gpus, launch.half, launch.shards)
        run = with_micro_batch(asked, plan.machine.limit)
        text = report(run, plan)
        program = format_program(plan, config, flags)
    except (ValueError, OSError) as error:
        fail(str(error))
    sys.stdout.write(text + "\n")
    size = f"{run.memory.total / GiB:.1f}"
    if fits(run, plan):
        chosen = [] if config.train.gradient_accumulation_steps else [rounds_flag(run)]
        sys.stdout.write(f"It fits: {size} of {plan.machine.memory:g} GiB (estimated).\n")
        sys.stdout.write(f"  {format_launch(run, program, chosen)}\n  {summarize_hours(run, plan)}\n")
        return
    sys.stdout.write(f"It does not fit: {size} GiB of {plan.machine.memory:g} GiB less {plan.machine.reserve:g}.\n")
    variant = find_fitting(asked, plan.machine.limit, {what_counts(asked): asked})
    if variant is None:
        sys.stdout.write("Nothing that this command tries does: take larger GPUs or a smaller teacher.\n")
    else:
        size = f"{variant.run.memory.total / GiB:.1f}"
        sys.stdout.write(f"The least change that does, {size} GiB (estimated):\n")
        sys.stdout.write(f"  {format_launch(variant.run, program, variant.flags)}\n")
        sys.stdout.write(f"  {summarize_hours(variant.run, plan)}\n")
    raise SystemExit(1)


def rounds_flag(run: Run) -> str:
    return f"--gradient_accumulation_steps {run.config.train.rounds}"
