"""Does a run fit, and how long does it take: parameters, bytes, disk space and hours, before any download.

    python -m pipelines.plan recipes/dmd2_sdxl.py --gpus 8 --memory 80 -- --method.guidance 7
    python -m pipelines.plan --family flux --method dmd2 --lora 64 --gpus 8

Roles are built by the training code from public configs on the meta device, and the method's losses run there. Weights,
gradients and optimizer state are exact, FLOPs are counted, activations are estimated. If the run does not fit, the exit
status is 1, and the nearest configuration that fits is named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from distill import methods
from distill.configuration import Config, fail, parse
from distill.data import Digits
from distill.diffusion.student import grid_times
from distill.layout import find_recipe, program_name
from distill.method import Requirement
from distill.networks.lora import LoRA
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from distill.training.step import BUCKET
from pipelines import fields
from pipelines.components import Network

if TYPE_CHECKING:
    from distill.roles import Nets
    from pipelines.planning.flop_counter import Cost
    from pipelines.planning.models import Meta
    from pipelines.teacher import Teacher

GiB = 2**30
TFLOP = 1e12
CHIPS = {  # dense bfloat16 matrix peak with float32 sums, TFLOP/s; the vendors' data sheets
    "A100": (312.0, "NVIDIA A100 data sheet"),
    "H100 SXM": (989.4, "NVIDIA H100 data sheet, half of the figure with sparsity"),
    "H200": (989.5, "NVIDIA H200 data sheet, half of the figure with sparsity"),
    "B200": (2250.0, "NVIDIA DGX B200 data sheet, an eighth of the system's, without sparsity"),
    "MI300X": (1307.4, "AMD Instinct MI300X data sheet"),
    "L40S": (362.05, "NVIDIA L40S data sheet"),
    "RTX 3090": (71.0, "NVIDIA GA102 white paper"),
    "RTX 4090": (165.2, "NVIDIA Ada white paper"),
    "RTX 5090": (209.5, "NVIDIA RTX Blackwell white paper"),
}
METHODS: dict[str, Any] = {
    "dmd2": methods.DMD2(guidance=8.0),
    "dmd2-prompts": methods.DMD2(guidance=8.0, gan=0.0, gan_fake=0.0),
    "sid": methods.SiD(kappa=(1.5, 1.5, 1.5, 1.5)),
    "vsd": methods.VSD(),
    "lcd": methods.LCD(guidance=7.5, target_ema=0.0),
    "scm": methods.SCM(guidance=4.5),
}
RANK = 64  # rank of suggested adapters (DMD2's, LCM's and SwiftBrush's)


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


@dataclass(frozen=True)
class Bytes:
    """Memory of one GPU. Without sharding everything but the activations is exact."""

    weights: int
    average: int  # of the student's moving average
    gradients: int  # of one player: they are cleared before the next player's update
    optimizer: int
    buckets: int  # of the all-reduce, or of gathered units
    activations: int  # estimated

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Run:
    """One configuration on a number of GPUs, with everything that is counted about it."""

    config: Config[Any, Any]
    parts: Meta
    gpus: int = 1
    half: bool = True
    shards: int = 1  # number of shards of weights, gradients and optimizer state (FSDP), each on gpus / shards GPUs

    @cached_property
    def built(self) -> tuple[Teacher, dict[str, Any], Nets]:
        """Teacher, condition of one sample, and roles, on the meta device."""
        import torch

        from distill.training.build import build
        from pipelines.inference import controlnet, pag
        from pipelines.teacher import teacher_of

        guidance_embedded = Requirement.GUIDANCE_EMBEDDING in self.config.method.requirements
        teacher = teacher_of(self.parts, self.config.resolution, self.config.frames, guidance_embedded)
        kinds = {"class_labels": torch.long}
        shapes = self.parts.condition().items()
        c = {key: torch.empty(1, *shape, dtype=kinds.get(key), device="meta") for key, shape in shapes}
        if teacher.denoiser.null is None and Requirement.NULL_CONDITION in self.config.method.requirements:
            teacher.denoiser.null = c
        student = self.config.student
        times = student.times or grid_times(student.steps, student.first(teacher.denoiser.schedule))
        student = replace(student, times=times, sigma=None, timestep=None)
        with torch.device("meta"):
            if Requirement.CONTROL_PICTURE in self.config.method.requirements:
                controlnet.install_adapter(teacher)
            nets = build(self.config.method, teacher.denoiser, teacher.shape, c, student, self.config.fake)
        if told := controlnet.example_picture(teacher.denoiser, teacher):
            nets.control = lambda x: told["control"].to("meta").expand(len(x), -1, -1, -1)
            nets.teacher = teacher.denoiser = controlnet.without_controlnet(teacher.denoiser)
        pag.attach_pag(nets, self.config.pag_scale, self.config.pag_layers)
        if self.half:
            for p in teacher.denoiser.net.parameters():  # adapters share these
                p.data = p.data.to(torch.bfloat16)
        return teacher, c, nets

    @property
    def micro(self) -> int:
        return self.config.train.micro_batch(self.gpus)

    @cached_property
    def parameters(self) -> dict[str, tuple[int, int]]:
        """{role: (number of parameters, number of trained parameters)}."""
        _, _, nets = self.built
        roles = nets.frozen() | nets.modules()
        moved = nets.modules().keys() - {"target"}
        trained = lambda role, p: p.requires_grad and role in moved
        count = lambda role, net: sum(p.numel() for p in net.parameters() if trained(role, p))
        return {role: (sum(p.numel() for p in net.parameters()), count(role, net)) for role, net in roles.items()}

    @cached_property
    def cost(self) -> Cost:
        from pipelines.planning.flop_counter import cost

        _, c, nets = self.built
        recompute = self.config.train.gradient_checkpointing
        return cost(self.config.method, nets, c, self.micro, self.half, recompute)

    @cached_property
    def unsharded_memory(self) -> Bytes:
        """Memory without sharding, except the activations."""
        from distill.networks.ema import EMA
        from pipelines.planning.flop_counter import distinct, players

        _, _, nets = self.built
        owners = players(nets)
        roles = [*nets.frozen().values(), *nets.modules().values()]
        weights = list(distinct(*roles))
        cfg = self.config.train
        average = EMA(nets.student.denoiser.net, cfg.ema_half_life, width=cfg.ema_width).net
        ema = list(distinct(*roles, average))[len(weights) :]
        gradients = max(sum(p.nbytes for p in params) for params in owners.values())
        kind = self.config.train.optimizer
        optimizer = sum(moments(p.numel(), kind) for params in owners.values() for p in params)
        parts = [sum(t.nbytes for t in weights), sum(t.nbytes for t in ema), gradients, optimizer]
        return Bytes(*parts, 0, 0)  # type: ignore[call-arg]

    @property
    def state(self) -> Bytes:
        """Memory except the activations."""
        whole = self.unsharded_memory
        if self.shards == 1:
            return replace(whole, buckets=min(4 * BUCKET, whole.gradients) if self.gpus > 1 else 0)
        teacher, _, nets = self.built
        largest, rest = gathered(teacher.denoiser.net)
        bytes_of = lambda net: sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
        whole_nets = (*nets.frozen().values(), *nets.modules().values())
        weights = sum(map(bytes_of, whole_nets))  # backbones of adapters, each once
        average = bytes_of(nets.student.denoiser.net) if whole.average else 0
        parts = [size // self.shards for size in (weights, average, whole.gradients, whole.optimizer)]
        buckets = (2 if self.half else 4) * (2 * largest + rest) + 4 * largest
        return Bytes(*parts, buckets, 0)  # type: ignore[call-arg]

    @property
    def memory(self) -> Bytes:
        return replace(self.state, activations=self.cost.activations)

    def over(self, gpus: int, shards: int) -> Run:
        """The same micro-batch on other GPUs. Counts are kept."""
        run = replace(self, gpus=gpus, shards=shards)
        run.__dict__.update({name: getattr(self, name) for name in ("built", "unsharded_memory", "cost")})
        return run

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: trained weights, their average, optimizer state."""
        trained = 4 * sum(n for _, n in self.parameters.values())
        return trained + self.unsharded_memory.average + self.unsharded_memory.optimizer

    @property
    def flops(self) -> float:
        """FLOPs of the whole run on all GPUs together."""
        train = self.config.train
        return self.cost.flops / self.cost.micro * train.train_batch_size * train.max_train_steps


def moments(numel: int, kind: str) -> int:
    """Bytes of the optimizer's state for one parameter."""
    if kind == "adamw8bit" and numel >= 4096:  # bitsandbytes: two bytes, and two float32 scales per block of 256
        return 2 * numel + 2 * 4 * -(-numel // 256)
    return 8 * numel + (0 if kind == "adamw8bit" else 4)  # torch stores the step count in a float32 per parameter


def gathered(net: Network) -> tuple[int, int]:
    """(parameters of the largest FSDP unit, parameters outside units). Two units and the rest are gathered."""
    from pipelines.planning.flop_counter import units

    sizes = [sum(p.numel() for p in unit.parameters()) for unit in units(net)]
    return max(sizes, default=0), sum(p.numel() for p in net.parameters()) - sum(sizes)


def configured(plan: Plan, flags: list[str]) -> tuple[Config[Any, Any], Meta]:
    """The configuration of a recipe or family, with the plan's options applied, and its teacher's configs."""
    from pipelines.planning.models import MODELS, Meta

    if plan.recipe is not None:
        config = parse(*of(plan.recipe, flags), f"flags of {plan.recipe}")
        if config.student.network is not None:
            fields.read(Path(config.student.network) / "config.json")
        named = [model for key, model in MODELS.items() if config.teacher in (key, model.hub)]
        if config.teacher and Path(config.teacher).is_dir():
            parts = Meta.of(Path(config.teacher))
        elif named:
            parts = Meta(named[0])
        else:
            known = ", ".join(model.hub for model in MODELS.values())
            raise ValueError(
                f"no configs of teacher {config.teacher!r}: give the folder of a pipeline, or one of {known}"
            )
    else:
        if plan.family not in MODELS:
            raise ValueError(f"family is {plan.family!r}; it must be one of {', '.join(MODELS)}")
        parts = Meta(MODELS[plan.family])
        method = METHODS[plan.method]
        steps = 4 if plan.method.startswith("dmd2") else 1
        train = TrainConfig(train_batch_size=plan.gpus, max_train_steps=10_000, ema_half_life=0)
        config = Config(method, Digits(), MODELS[plan.family].hub, student=StudentConfig(steps=steps), train=train)
    if plan.lora is not None or plan.preset is not None:
        config = adapted(config, parts, plan.lora or RANK, True)
    if plan.preset == "24gb":
        config = small(config, parts)
    return config, parts


def of(recipe: Path, flags: list[str]) -> tuple[Config[Any, Any], list[str]]:
    """(CONFIG of a recipe, from its file or its name, the flags).

    If the file has a function `resolve`, like recipes/train.py, it makes both from the flags.
    """
    import runpy

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


def adapted(config: Config[Any, Any], parts: Meta, rank: int, fake: bool) -> Config[Any, Any]:
    """The configuration with a LoRA student, and a LoRA fake score too if `fake`. Existing adapters and EDM stay."""
    if not parts.family.lora_targets:
        return config
    lora = LoRA(rank, float(rank), parts.family.lora_targets)
    student = config.student if config.student.lora.rank else replace(config.student, lora=lora)
    other = replace(config.fake, lora=lora) if fake and not config.fake.lora.rank else config.fake
    return replace(config, student=student, fake=other)


def small(config: Config[Any, Any], parts: Meta) -> Config[Any, Any]:
    """The preset for a 24 GB card: accumulated batches of 1, recomputed blocks, no GAN."""
    backbone = sum(2 * p.numel() for p in parts.net.parameters())
    if backbone > 20 * GiB:
        raise ValueError(
            f"--preset 24gb: the backbone of {parts.model.hub} alone is {backbone / GiB:.1f} GiB in bfloat16; it would "
            "need 4-bit weights, which are not supported. Use --memory 80, or a smaller teacher"
        )
    if not isinstance(config.method, methods.DMD2 | methods.LCD):
        raise ValueError("--preset 24gb is for LCM-LoRA and DMD2 from prompts alone: --method lcd or dmd2-prompts")
    if isinstance(config.method, methods.DMD2):
        config = replace(config, method=replace(config.method, gan=0.0, gan_fake=0.0))
    elif config.method.target_ema:
        config = replace(config, method=replace(config.method, target_ema=0.0))
    train = replace(config.train, gradient_accumulation_steps=config.train.train_batch_size)
    return replace(config, train=replace(train, gradient_checkpointing=True))


def cheaper_variants(run: Run) -> Iterator[tuple[str, Run]]:
    """Configurations that need less memory, each with one more change: first for a single GPU, then for more GPUs."""
    changes: list[str] = []

    def then(change: str, run: Run) -> tuple[str, Run]:
        changes.append(change)
        return ", ".join(changes), run

    def fresh(run: Run, **changed: Any) -> Run:
        return replace(run, config=replace(run.config, **changed))

    train = run.config.train
    if not train.gradient_checkpointing:
        run = fresh(run, train=replace(train, gradient_checkpointing=True))
        yield then("--gradient_checkpointing", run)
    if run.micro > 1:
        rounds = train.train_batch_size // run.gpus
        run = fresh(run, train=replace(run.config.train, gradient_accumulation_steps=rounds))
        yield then(f"--gradient_accumulation_steps {rounds}", run)
    if train.optimizer != "adamw8bit":
        run = fresh(run, train=replace(run.config.train, optimizer="adamw8bit"))
        yield then("--optimizer adamw8bit", run)
    before = list(changes)
    whole = run
    for fake, change in ((False, f"--student.lora.rank {RANK}"), (True, f"--fake.lora.rank {RANK}")):
        less = adapted(run.config, run.parts, RANK, fake)
        if less != run.config and (not fake or "fake" in run.config.method.roles):
            run = replace(run, config=less)
            yield then(change, run)
    changes = before
    for gpus in (2**i for i in range(1, 11)):
        if gpus >= run.gpus and train.train_batch_size % gpus == 0:
            rounds = train.train_batch_size // gpus
            options = {"gradient_accumulation_steps": rounds, "optimizer": "adamw"}  # 8-bit moments are not sharded
            more = fresh(whole, train=replace(whole.config.train, **options))
            label = f"weights sharded over {gpus} GPUs (FSDP2: docs/scaling.md)"
            shared = [change for change in before if "adamw8bit" not in change]
            yield ", ".join([*shared, label]), replace(more, gpus=gpus, shards=gpus)


def fits(run: Run, plan: Plan) -> bool:
    limit = (plan.memory - plan.reserve) * GiB
    return run.state.total <= limit and run.memory.total <= limit  # counting activations takes time


@dataclass(frozen=True)
class Table:
    """Rows of cells, printed as lines with aligned columns."""

    rows: list[list[str]] = field(default_factory=list)

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        number = lambda column: any(row[column][:1].isdigit() for row in self.rows[1:])
        right = [i > 0 and number(i) for i in range(len(widths))]
        pad = lambda row: [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "\n".join("  " + "  ".join(pad(row)).rstrip() for row in self.rows) + "\n"


def memories(run: Run, plan: Plan) -> Table:
    """The memory of this configuration, and with full copies, adapters or sharded weights instead."""
    full = replace(run.config, student=replace(run.config.student, lora=LoRA()), fake=FakeConfig())
    lora = adapted(run.config, run.parts, RANK, True)
    runs = {"this run": run}
    runs |= {} if full == run.config else {"full copies": replace(run, config=full)}
    runs |= {} if lora == run.config else {f"LoRA {RANK}": replace(run, config=lora)}
    if plan.gpus > 1:
        runs[f"full copies, FSDP over {plan.gpus}"] = runs.get("full copies", run).over(plan.gpus, plan.gpus)
    names = list(Bytes.__dataclass_fields__)
    rows = [["GiB on each GPU", *names, "total", "fits"]]
    for name, one in runs.items():
        found = one.memory
        sizes = [*(getattr(found, n) for n in names), found.total]
        rows.append([name, *(f"{size / GiB:.2f}" for size in sizes), "yes" if fits(one, plan) else "no"])
    return Table(rows)


def report(run: Run, plan: Plan) -> str:
    """The complete plan as text."""
    teacher, c, _ = run.built
    train = run.config.train
    cost = run.cost
    config = run.config
    lines = [
        f"{type(config.method).__name__} on {run.parts.model.hub}: samples {teacher.shape}, {plan.gpus} GPU(s) of "
        f"{plan.memory:g} GiB, {run.micro} sample(s) in a micro-batch, {train.gradient_accumulation_steps} of them an "
        f"update, {'bfloat16 autocast' if run.half else 'float32'}"
        f"{', blocks recomputed' if train.gradient_checkpointing else ''}\n"
    ]
    roles = [["parameters", "all", "trained"]]
    roles += [[role, f"{n:,}", f"{trained:,}"] for role, (n, trained) in run.parameters.items()]
    lines += [str(Table(roles)), str(memories(run, plan))]
    lines.append("  activations are an estimate (tensors alive in the run on the meta device); the rest is exact,")
    lines.append(f"  sharded rows divide it. {plan.reserve:g} GiB of each GPU is kept free. No GPU was used.\n")
    judges = {
        Requirement.PERCEPTUAL_DISTANCE: "LPIPS and its decoder",
        Requirement.REWARD: "the reward and its decoder",
    }
    for requirement, judge in judges.items():
        if requirement in config.method.requirements:
            lines.append(f"  {judge} are left out, of memory and of FLOPs.\n")

    prompt = 2 * sum(s.numel() for s in c.values())
    disk = [["disk", "GB"], [f"cache of {plan.prompts:,} prompts, at most", f"{plan.prompts * prompt / 1e9:.1f}"]]
    if Requirement.REAL in config.method.requirements:
        import math

        image = 2 * math.prod(teacher.shape)
        disk.append([f"cache of {plan.images:,} images", f"{plan.images * image / 1e9:.1f}"])
    kept = (train.checkpoints_total_limit or train.max_train_steps // max(train.checkpointing_steps, 1)) + 1
    disk.append([f"{kept} checkpoints, one being written", f"{kept * run.checkpoint / 1e9:.1f}"])
    disk.append(["exported network", f"{4 * run.parameters['teacher'][0] / 1e9:.1f}"])
    lines.append(str(Table(disk)))

    sample = cost.flops / cost.micro / TFLOP
    lines.append(
        f"  {sample:.2f} TFLOP a sample and step (counted, averaged over {cost.cycle} steps), "
        f"{run.flops:.3g} FLOP for {train.max_train_steps:,} steps of {train.train_batch_size}\n"
    )
    hours = [[f"hours at {plan.share:.0%} of the peak", "TFLOP/s", f"{plan.gpus} GPU(s)", "GPU hours", "peak from"]]
    for name, (peak, source) in CHIPS.items():
        spent = run.flops / (peak * TFLOP * plan.share) / 3600
        hours.append([name, f"{peak:g}", f"{spent / plan.gpus:,.1f}", f"{spent:,.1f}", source])
    lines.append(str(Table(hours)))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    try:
        plan = tyro.cli(Plan, args=argv[:split], description=__doc__, use_underscores=True, prog=program_name())
        if plan.preset == "24gb":
            plan = replace(plan, gpus=1, memory=min(plan.memory, 22.0))
        config, parts = configured(plan, argv[split + 1 :])
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
