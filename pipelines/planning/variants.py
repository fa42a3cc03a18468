"""Configurations that need less memory than a given one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from distill import methods
from distill.networks.lora import LoRA
from pipelines.planning.memory_plan import GiB, Run, RunConfig
from pipelines.planning.micro_batch import choose_micro_batch, measure_activations, share_networks

if TYPE_CHECKING:
    from pipelines.planning.models import Meta

NODE = 8  # GPUs of one machine in recipes/accelerate
RANK = 64  # rank of suggested adapters (DMD2's, LCM's and SwiftBrush's)


def with_lora(config: RunConfig, parts: Meta, rank: int, fake: bool) -> RunConfig:
    """The configuration with a LoRA student, and a LoRA fake score too if `fake`. Existing adapters and EDM stay."""
    if not parts.family.lora_targets:
        return config
    lora = LoRA(rank, float(rank), parts.family.lora_targets)
    student = config.student if config.student.lora.rank else replace(config.student, lora=lora)
    other = replace(config.fake, lora=lora) if fake and not config.fake.lora.rank else config.fake
    return replace(config, student=student, fake=other)


def apply_24gb_preset(config: RunConfig, parts: Meta) -> RunConfig:
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


@dataclass(frozen=True)
class Variant:
    """A run that needs less memory than another. flags: the flags of the recipe that make it of the other."""

    run: Run
    flags: tuple[str, ...] = ()

    def with_train(self, flags: str, **values: object) -> Variant:
        """Change values of TrainConfig, as `flags` do."""
        config = self.run.config
        train = replace(config.train, **values)  # type: ignore[arg-type]
        return Variant(replace(self.run, config=replace(config, train=train)), (*self.flags, flags))


def recompute_blocks(variant: Variant) -> Variant | None:
    if variant.run.config.train.gradient_checkpointing:
        return None
    return variant.with_train("--gradient_checkpointing", gradient_checkpointing=True)


def shard_state(variant: Variant) -> Variant | None:
    """Split the state over the GPUs, at most eight ways (recipes/accelerate). 8-bit moments cannot be split."""
    run = variant.run
    shards = min(run.gpus, NODE)
    if run.shards > 1 or shards == 1 or run.gpus % shards or run.config.train.optimizer == "adamw8bit":
        return None
    return replace(variant, run=replace(run, shards=shards))


def quantize_moments(variant: Variant) -> Variant | None:
    if variant.run.config.train.optimizer != "adamw" or variant.run.shards > 1:
        return None
    return variant.with_train("--optimizer adamw8bit", optimizer="adamw8bit")


def drop_average(variant: Variant) -> Variant | None:
    train = variant.run.config.train
    if train.ema_width is not None:
        return variant.with_train("--ema_width None --ema_half_life 0", ema_width=None, ema_half_life=0.0)
    return variant.with_train("--ema_half_life 0", ema_half_life=0.0) if train.ema_half_life else None


def adapt_fake(variant: Variant) -> Variant | None:
    """Train adapters of the fake score. Those of a student that is a full copy would not share its backbone."""
    config = variant.run.config
    if "fake" not in config.method.roles or not variant.run.parts.family.lora_targets or config.fake.lora.rank:
        return None
    lora, flags = _adapters(config.fake.lora, "fake", variant.run.parts)
    changed = replace(config, fake=replace(config.fake, lora=lora))
    return Variant(replace(variant.run, config=changed), (*variant.flags, flags))


def adapt_student(variant: Variant) -> Variant | None:
    config = variant.run.config
    student = config.student
    if not variant.run.parts.family.lora_targets or student.lora.rank or student.network or student.negative:
        return None
    lora, flags = _adapters(student.lora, "student", variant.run.parts)
    changed = replace(config, student=replace(student, lora=lora))
    return Variant(replace(variant.run, config=changed), (*variant.flags, flags))


def _adapters(lora: LoRA, role: str, parts: Meta) -> tuple[LoRA, str]:
    """(adapters, flags that make them): with scale and targets of the configuration, or else of the family."""
    if lora != LoRA():
        return replace(lora, rank=RANK), f"--{role}.lora.rank {RANK}"
    targets = parts.family.lora_targets
    flags = f"--{role}.lora.rank {RANK} --{role}.lora.alpha {RANK} --{role}.lora.targets {' '.join(targets)}"
    return LoRA(RANK, float(RANK), targets), flags


Step = Callable[[Variant], Variant | None]  # a change that needs less memory; None: it is made already, or impossible
SAME_RESULT: tuple[Step, ...] = (recompute_blocks, shard_state)  # they change numbers by rounding alone
OTHER_RESULT: tuple[Step, ...] = (quantize_moments, drop_average, adapt_fake, adapt_student)  # the least change first


def list_variants(run: Run) -> Iterator[Variant]:
    """The run, then variants of it that need less memory: the least change of the experiment first.

    On more GPUs, which change nothing of it, the search goes on when all changes on its own GPUs were tried.
    """
    subsets = [[step for i, step in enumerate(OTHER_RESULT) if n >> i & 1] for n in range(2 ** len(OTHER_RESULT))]
    for steps in subsets:
        yield from _with_same_result(apply_steps(Variant(run), steps))
    batch = run.config.train.train_batch_size
    for gpus in (2**i for i in range(1, 11)):
        if gpus > run.gpus and batch % gpus == 0:
            yield from _with_same_result(Variant(replace(run, gpus=gpus)))


def apply_steps(variant: Variant | None, steps: Iterable[Step]) -> Variant | None:
    """The variant with all steps, or None if one of them changes nothing."""
    for step in steps:
        variant = variant and step(variant)
    return variant


def _with_same_result(variant: Variant | None) -> Iterator[Variant]:
    for n in range(2 ** len(SAME_RESULT)):
        found = apply_steps(variant, [step for i, step in enumerate(SAME_RESULT) if n >> i & 1])
        if found is not None:
            yield found


Counted = dict[tuple[object, ...], Run]  # runs whose activations and FLOPs are counted, by what these depend on


def find_fitting(run: Run, limit: float, counted: Counted | None = None) -> Variant | None:
    """The first variant whose memory is at most `limit` bytes on each GPU, with its micro-batch; None: none fits.

    Activations are counted only for variants whose state fits, and once for variants with the same activations;
    `counted` keeps them for another search.
    """
    counted = {} if counted is None else counted
    built = {(run.config.student, run.config.fake): run}
    for variant in list_variants(run):
        config = variant.run.config
        share_networks(built.setdefault((config.student, config.fake), variant.run), variant.run)
        if variant.run.state.total > limit:
            continue
        like = counted.setdefault(what_counts(variant.run), variant.run)
        memory = measure_activations(like).on_top_of(variant.run.state.total, limit)
        batch = config.train.train_batch_size
        micro = choose_micro_batch(batch, variant.run.gpus, memory)
        if micro is None:
            continue
        rounds = batch // variant.run.gpus // micro
        return variant.with_train(f"--gradient_accumulation_steps {rounds}", gradient_accumulation_steps=rounds)
    return None


def what_counts(run: Run) -> tuple[object, ...]:
    """What the activations and the FLOPs of a sample depend on, of what variants change."""
    config = run.config
    return (config.train.gradient_checkpointing, config.student, config.fake)
