"""The choice of a run at its start: as few micro-batches as the memory of its GPUs allows, or what fits instead."""

from __future__ import annotations

import sys
from dataclasses import replace

from pipelines.planning.launch_line import format_launch, recipe_program
from pipelines.planning.memory_plan import GiB, Run, RunConfig
from pipelines.planning.micro_batch import find_parts, with_micro_batch
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
    rounds = run.config.train.rounds
    micro = run.config.train.micro_batch(gpus)
    sys.stderr.write(f"{card}: {rounds} micro-batch(es) of {micro} sample(s) in an update, by the plan of the run\n")
    return rounds


def describe_fitting(run: Run, limit: float) -> str:
    """The launch line of the least change that fits, in bfloat16, or that there is none."""
    variant = find_fitting(replace(run, half=True), limit)
    if variant is None:
        return "Nothing that `python -m pipelines.plan` tries fits: take larger GPUs or a smaller teacher."
    program = [*recipe_program(sys.argv[0].split()[-1]), *sys.argv[1:]]
    return f"This fits:\n  {format_launch(variant.run, program, variant.flags)}"
