"""Does a run fit, and how long does it take: parameters, bytes, disk space and hours, before any download.

    python -m pipelines.plan recipes/dmd2_sdxl.py --gpus 8 --memory 80 -- --method.guidance 7
    python -m pipelines.plan --family flux --method dmd2 --lora 64 --gpus 8

Roles are built by the training code from public configs on the meta device, and the method's losses run there. Weights,
gradients and optimizer state are exact, FLOPs are counted, activations are estimated. If the run does not fit, the exit
status is 1, and the nearest configuration that fits is named.
"""

from __future__ import annotations

import math
import runpy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from distill import methods
from distill.configuration import Config, fail, parse
from distill.data import Digits
from distill.layout import find_recipe, program_name
from distill.method import Method, Requirement
from distill.networks.lora import LoRA
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from pipelines import fields
from pipelines.planning.hours import CHIPS, TFLOP
from pipelines.planning.memory_plan import Bytes, GiB, Run, RunConfig
from pipelines.planning.table import Table
from pipelines.planning.variants import RANK, apply_24gb_preset, cheaper_variants, with_lora

if TYPE_CHECKING:
    from pipelines.planning.models import Meta

METHODS: dict[str, Method] = {
    "dmd2": methods.DMD2(guidance=8.0),
    "dmd2-prompts": methods.DMD2(guidance=8.0, gan=0.0, gan_fake=0.0),
    "sid": methods.SiD(kappa=(1.5, 1.5, 1.5, 1.5)),
    "vsd": methods.VSD(),
    "lcd": methods.LCD(guidance=7.5, target_ema=0.0),
    "scm": methods.SCM(guidance=4.5),
}


@dataclass(frozen=True)
class Plan:
    """The run to plan, and the machine."""

    recipe: Annotated[Path | None, tyro.conf.Positional] = None  # a recipe's name or file; its own flags follow --
    family: str | None = None  # family of the teacher, without a recipe: sd15, sdxl, sd3, flux, qwen, sana, wan, ...
    method: Literal["dmd2", "dmd2-prompts", "sid", "vsd", "lcd", "scm"] = "dmd2"  # method, without a recipe
    lora: int | None = None  # rank of the adapters of student and fake score; None: the recipe's, or full copies
    gpus: int = 1
    memory: float = 80.0  # GiB per GPU
    reserve: float = 1.0  # GiB of it for driver, libraries and allocator gaps
    share: float = 0.4  # fraction of the matrix peak that the run reaches: an aim, not a measurement
    mixed_precision: Literal["bf16", "no"] = "bf16"
    prompts: int = 500_000  # number of prompts in the cache
    images: int = 500_000  # number of images in the cache, if the method needs real images
    preset: Literal["24gb"] | None = None  # one GPU of 24 GB: 22 GiB, adapters on a bfloat16 backbone, prompts only

    def __post_init__(self) -> None:
        if (self.recipe is None) == (self.family is None):
            raise ValueError("give either a recipe (recipes/dmd2_sdxl.py) or --family and --method")
        for name in ("gpus", "memory", "share", "prompts"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


def resolve_config(plan: Plan, flags: list[str]) -> tuple[RunConfig, Meta]:
    """The configuration of a recipe or family, with the plan's options applied, and its teacher's configs."""
    config, parts = _from_family(plan) if plan.recipe is None else _from_recipe(plan.recipe, flags)
    if plan.lora is not None or plan.preset is not None:
        config = with_lora(config, parts, plan.lora or RANK, True)
    if plan.preset == "24gb":
        config = apply_24gb_preset(config, parts)
    return config, parts


def _from_recipe(recipe: Path, flags: list[str]) -> tuple[RunConfig, Meta]:
    from pipelines.planning.models import MODELS, Meta

    config = parse(*load_recipe_config(recipe, flags), f"flags of {recipe}")
    if config.student.network is not None:
        fields.read(Path(config.student.network) / "config.json")
    if config.teacher and Path(config.teacher).is_dir():
        return config, Meta.from_folder(Path(config.teacher))
    for name, model in MODELS.items():
        if config.teacher in (name, model.hub):
            return config, Meta(model)
    known = ", ".join(model.hub for model in MODELS.values())
    raise ValueError(f"no configs of teacher {config.teacher!r}: give the folder of a pipeline, or one of {known}")


def _from_family(plan: Plan) -> tuple[RunConfig, Meta]:
    from pipelines.planning.models import MODELS, Meta

    if plan.family not in MODELS:
        raise ValueError(f"family is {plan.family!r}; it must be one of {', '.join(MODELS)}")
    model = MODELS[plan.family]
    steps = 4 if plan.method.startswith("dmd2") else 1
    train = TrainConfig(train_batch_size=plan.gpus, max_train_steps=10_000, ema_half_life=0)
    method = METHODS[plan.method]
    return Config(method, Digits(), model.hub, student=StudentConfig(steps=steps), train=train), Meta(model)


def load_recipe_config(recipe: Path, flags: list[str]) -> tuple[RunConfig, list[str]]:
    """(CONFIG of a recipe, from its file or its name, the flags).

    If the file has a function `resolve`, like recipes/train.py, it makes both from the flags.
    """
    script = find_recipe(str(recipe))
    if script is None:
        raise ValueError(
            f"no recipe at {str(recipe)!r}: name a Python file with a Config named CONFIG, as in recipes/, or a recipe "
            "that `distill recipes` lists"
        )
    names = runpy.run_path(str(script))
    if "resolve" in names:
        return names["resolve"](flags)
    found = names.get("CONFIG")
    if not isinstance(found, Config):
        raise ValueError(f"{recipe} has no Config named CONFIG at its top level, as those in recipes/ do")
    return found, flags


def fits(run: Run, plan: Plan) -> bool:
    limit = (plan.memory - plan.reserve) * GiB
    return run.state.total <= limit and run.memory.total <= limit  # counting activations takes time


def compare_memory(run: Run, plan: Plan) -> Table:
    """The memory of this configuration, and with full copies, adapters or sharded weights instead."""
    full = replace(run.config, student=replace(run.config.student, lora=LoRA()), fake=FakeConfig())
    lora = with_lora(run.config, run.parts, RANK, True)
    runs = {"this run": run}
    runs |= {} if full == run.config else {"full copies": replace(run, config=full)}
    runs |= {} if lora == run.config else {f"LoRA {RANK}": replace(run, config=lora)}
    if plan.gpus > 1:
        runs[f"full copies, FSDP over {plan.gpus}"] = runs.get("full copies", run).on_gpus(plan.gpus, plan.gpus)
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
    lines = [
        f"{type(config.method).__name__} on {run.parts.model.hub}: samples {teacher.shape}, {plan.gpus} GPU(s) of "
        f"{plan.memory:g} GiB, {run.micro} sample(s) in a micro-batch, {train.gradient_accumulation_steps} of them an "
        f"update, {precision}{recompute}\n"
    ]
    roles = [["parameters", "all", "trained"]]
    roles += [[role, f"{n:,}", f"{trained:,}"] for role, (n, trained) in run.parameters.items()]
    lines += [str(Table(roles)), str(compare_memory(run, plan))]
    lines.append("  activations are an estimate (tensors alive in the run on the meta device); the rest is exact,")
    lines.append(f"  sharded rows divide it. {plan.reserve:g} GiB of each GPU is kept free. No GPU was used.\n")
    judges = {
        Requirement.PERCEPTUAL_DISTANCE: "LPIPS and its decoder",
        Requirement.REWARD: "the reward and its decoder",
    }
    for requirement, judge in judges.items():
        if requirement in config.method.requirements:
            lines.append(f"  {judge} are left out, of memory and of FLOPs.\n")
    return "\n".join([*lines, str(disk_sizes(run, plan)), *format_hours(run, plan)])


def disk_sizes(run: Run, plan: Plan) -> Table:
    """The disk space of caches, checkpoints and the export."""
    teacher, c, _ = run.networks
    train = run.config.train
    prompt = 2 * sum(s.numel() for s in c.values())
    rows = [["disk", "GB"], [f"cache of {plan.prompts:,} prompts, at most", f"{plan.prompts * prompt / 1e9:.1f}"]]
    if Requirement.REAL in run.config.method.requirements:
        image = 2 * math.prod(teacher.shape)
        rows.append([f"cache of {plan.images:,} images", f"{plan.images * image / 1e9:.1f}"])
    kept = (train.checkpoints_total_limit or train.max_train_steps // max(train.checkpointing_steps, 1)) + 1
    rows.append([f"{kept} checkpoints, one being written", f"{kept * run.checkpoint / 1e9:.1f}"])
    rows.append(["exported network", f"{4 * run.parameters['teacher'][0] / 1e9:.1f}"])
    return Table(rows)


def format_hours(run: Run, plan: Plan) -> list[str]:
    """The FLOPs of the run, and a table of its hours on every kind of GPU."""
    train = run.config.train
    cost = run.cost
    sample = cost.flops / cost.micro / TFLOP
    line = (
        f"  {sample:.2f} TFLOP a sample and step (counted, averaged over {cost.cycle} steps), "
        f"{run.flops:.3g} FLOP for {train.max_train_steps:,} steps of {train.train_batch_size}\n"
    )
    rows = [[f"hours at {plan.share:.0%} of the peak", "TFLOP/s", f"{plan.gpus} GPU(s)", "GPU hours", "peak from"]]
    for name, (peak, source) in CHIPS.items():
        spent = run.flops / (peak * TFLOP * plan.share) / 3600
        rows.append([name, f"{peak:g}", f"{spent / plan.gpus:,.1f}", f"{spent:,.1f}", source])
    return [line, str(Table(rows))]


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    try:
        plan = tyro.cli(Plan, args=argv[:split], description=__doc__, use_underscores=True, prog=program_name())
        if plan.preset == "24gb":
            plan = replace(plan, gpus=1, memory=min(plan.memory, 22.0))
        config, parts = resolve_config(plan, argv[split + 1 :])
        run = Run(config, parts, plan.gpus, plan.mixed_precision == "bf16")
        text = report(run, plan)
        good = fits(run, plan)
    except (ValueError, OSError) as error:
        fail(str(error))
    sys.stdout.write(text + "\n")
    if good:
        sys.stdout.write(f"It fits: {run.memory.total / GiB:.1f} of {plan.memory:g} GiB (estimated).\n")
        return
    over = run.memory.total / GiB
    sys.stdout.write(f"It does not fit: {over:.1f} GiB of {plan.memory:g} GiB less {plan.reserve:g}.\n")
    for change, less in cheaper_variants(run):
        if fits(less, plan):
            sys.stdout.write(f"The nearest that does, {less.memory.total / GiB:.1f} GiB (estimated): {change}\n")
            break
    else:
        sys.stdout.write("Nothing that this command tries does: take larger GPUs or a smaller teacher.\n")
    raise SystemExit(1)
