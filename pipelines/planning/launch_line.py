"""The launch line of a planned run: accelerate's configuration file, the recipe and its flags."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.files import read_yaml
from distill.layout import RECIPES, find_recipe, module_name
from pipelines.planning.memory_plan import Run

NODE = 8  # GPUs of one machine in recipes/accelerate


class LaunchFile(NamedTuple):
    """What a configuration file of accelerate asks for. shards: 1 for DDP."""

    processes: int
    shards: int
    mixed_precision: str


def read_launch_file(path: Path) -> LaunchFile:
    """ValueError for a file that is not one of accelerate's, or that asks for what the recipes do not support."""
    tree = read_yaml(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("num_processes"), int):
        raise ValueError(f"{path} is no configuration file of accelerate: it has no num_processes")
    processes: int = tree["num_processes"]
    shards = 1
    if tree.get("distributed_type") == "FSDP":
        parallel = tree.get("parallelism_config") or {}
        shards = int(parallel.get("parallelism_config_dp_shard_size", processes))
    return LaunchFile(processes, shards, str(tree.get("mixed_precision", "no")))


def format_launch(run: Run, program: Sequence[str], flags: Sequence[str]) -> str:
    """The complete command of a run, as accelerate starts it. On several machines it is for each of them.

    program: the recipe and the flags that the user gave. flags: those that are added, or replace flags of the user.
    """
    names = {word for flag in flags for word in flag.split() if word.startswith("--")}
    words = ["accelerate", "launch", *_launcher_flags(run), *without_flags(program, names)]
    return " ".join([*map(shlex.quote, words), *flags])


def without_flags(words: Sequence[str], names: Collection[str]) -> list[str]:
    """The words without these flags and their values. `--no_x` goes with `--x`."""
    others = []
    skip = False
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
            skip = flag in names or flag.replace("--no_", "--", 1) in names
        if not skip:
            others.append(word)
    return others


def recipe_program(recipe: str) -> list[str]:
    """The words that start a recipe. `recipes.train` is a module of a package, others are files."""
    script = find_recipe(recipe)
    if script is None or script.stem == "train":
        return ["-m", module_name("recipes.train")]
    return [os.path.relpath(script)]


def _launcher_flags(run: Run) -> list[str]:
    flags = ["--config_file", os.path.relpath(RECIPES / "accelerate" / _file_name(run))]
    machines = -(-run.gpus // NODE)
    if run.gpus not in (1, NODE):
        flags += ["--num_processes", f"{run.gpus}"]
    if machines > 1:
        if run.shards > 1:
            replicas = run.gpus // run.shards
            flags += ["--parallelism_config_dp_replicate_size", f"{replicas}"]
            flags += ["--parallelism_config_dp_shard_size", f"{run.shards}"]
        flags += ["--num_machines", f"{machines}", "--machine_rank", "RANK", "--main_process_ip", "HOST0"]
    if not run.half:
        flags += ["--mixed_precision", "no"]
    return flags


def _file_name(run: Run) -> str:
    if run.gpus == 1:
        return "gpu1.yaml"
    if run.shards == 1:
        return "gpu8_ddp.yaml"
    return "gpu8_fsdp2.yaml" if run.gpus <= NODE else "nodes2_fsdp2.yaml"
