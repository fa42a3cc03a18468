"""The choice of a run at its start: as few micro-batches as the memory of its GPUs allows, or what fits instead."""

from __future__ import annotations

import sys
from dataclasses import replace

from pipelines.planning.launch_line import format_launch, recipe_program
from pipelines.planning.memory_plan import GiB, Run, RunConfig
from pipelines.planning.micro_batch import find_parts, measure_activations, with_micro_batch
from pipelines.planning.variants import find_fitting

RESERVE = 2 * GiB  # kept free for driver, libraries and allocator gaps
MARGIN = 0.05  # and a share of the rest: activations are an estimate


def choose_rounds(config: RunConfig, teacher: str, gpus: int, shards: int, half: bool, memory: int) -> int | str | None:
    """The number of micro-batches of an update on GPUs of `memory` bytes.

    None if the configs of `teacher` are not known. A message if the state alone, which is exact, does not fit.
    """
    parts = find_parts(teacher)
    if parts is None:
        return None
    limit = (1 - MARGIN) * (memory - RESERVE)
    run = with_micro_batch(Run(config, parts, gpus, half, shards), limit)
    size = f"{run.state.total / GiB:.1f} GiB"
    card = f"{gpus} GPU(s) of {memory / GiB:.1f} GiB"
    if run.state.total > memory:
        return f"weights, gradients and optimizer take {size} on each of {card}.\n{describe_fitting(run, limit)}"
    return run.config.train.rounds


def advise(config: RunConfig, teacher: str, gpus: int, shards: int, half: bool) -> str:
    """The launch line of the least change that needs less memory than a run whose micro-batch is one sample."""
    parts = find_parts(teacher)
    if parts is None:
        return "Take --gradient_checkpointing, adapters (--student.lora.rank), or larger GPUs."
    train = replace(config.train, gradient_accumulation_steps=config.train.train_batch_size // gpus)
    run = Run(replace(config, train=train), parts, gpus, half, shards)
    return describe_fitting(run, 0.99 * measure_activations(run).on_top_of(run.state.total, 0.0).total(1))


def describe_fitting(run: Run, limit: float) -> str:
    """The launch line of the least change that fits, in bfloat16, or that there is none."""
    variant = find_fitting(replace(run, half=True), limit)
    if variant is None:
        return "Nothing that `python -m pipelines.plan` tries fits: take larger GPUs or a smaller teacher."
    program = [*recipe_program(sys.argv[0].split()[-1]), *sys.argv[1:]]
    return f"This fits:\n  {format_launch(variant.run, program, variant.flags)}"
