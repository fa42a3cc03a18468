"""Configurations that need less memory than a given one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from distill import methods
from distill.networks.lora import LoRA
from distill.training.config import TrainConfig
from pipelines.planning.memory_plan import GiB, Run, RunConfig

if TYPE_CHECKING:
    from pipelines.planning.models import Meta

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


def cheaper_variants(run: Run) -> Iterator[tuple[str, Run]]:
    """Configurations that need less memory, each with one more change: first for a single GPU, then for more GPUs."""
    changes: list[str] = []
    train = run.config.train
    if not train.gradient_checkpointing:
        run = with_train(run, replace(train, gradient_checkpointing=True))
        changes.append("--gradient_checkpointing")
        yield ", ".join(changes), run
    if run.micro > 1:
        rounds = train.train_batch_size // run.gpus
        run = with_train(run, replace(run.config.train, gradient_accumulation_steps=rounds))
        changes.append(f"--gradient_accumulation_steps {rounds}")
        yield ", ".join(changes), run
    if train.optimizer != "adamw8bit":
        run = with_train(run, replace(run.config.train, optimizer="adamw8bit"))
        changes.append("--optimizer adamw8bit")
        yield ", ".join(changes), run
    yield from _adapter_variants(run, changes)
    yield from _sharded_variants(run, [change for change in changes if "adamw8bit" not in change])


def with_train(run: Run, train: TrainConfig) -> Run:
    return replace(run, config=replace(run.config, train=train))


def _adapter_variants(run: Run, changes: list[str]) -> Iterator[tuple[str, Run]]:
    changes = list(changes)
    for fake, change in ((False, f"--student.lora.rank {RANK}"), (True, f"--fake.lora.rank {RANK}")):
        less = with_lora(run.config, run.parts, RANK, fake)
        if less != run.config and (not fake or "fake" in run.config.method.roles):
            run = replace(run, config=less)
            changes.append(change)
            yield ", ".join(changes), run


def _sharded_variants(run: Run, changes: list[str]) -> Iterator[tuple[str, Run]]:
    """Weights sharded over more GPUs. 8-bit moments are not sharded."""
    train = run.config.train
    for gpus in (2**i for i in range(1, 11)):
        if gpus >= run.gpus and train.train_batch_size % gpus == 0:
            rounds = train.train_batch_size // gpus
            more = with_train(run, replace(train, gradient_accumulation_steps=rounds, optimizer="adamw"))
            label = f"weights sharded over {gpus} GPUs (FSDP2: docs/scaling.md)"
            yield ", ".join([*changes, label]), replace(more, gpus=gpus, shards=gpus)
