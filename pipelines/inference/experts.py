"""Several networks in one pipeline: experts for noise levels (Phased DMD), students for groups of classes (MSD).

python -m pipelines.experts runs/part0/pipeline runs/part1/pipeline --output_dir runs/msd/pipeline     students of parts

If diffusers has such a pipeline, that one is used: two experts of Wan are `transformer` and `transformer_2` with
`boundary_ratio`. Otherwise the folder has the last network as the pipeline's own, and the others in experts/0,
experts/1, ..., each a network folder of diffusers. experts.json says which network is called when. Plain diffusers
loads the folder and calls only the last network. `install` makes the pipeline call all of them; eval.generate uses it.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeGuard, cast

import torch
import tyro
import yaml
from torch import Tensor, nn

from distill.configuration import fail
from distill.diffusion.student import Student
from distill.files import folder_lock
from distill.layout import program_name
from distill.networks.lora import merge_adapters
from distill.training.checkpoint import describe_disk_error
from pipelines import fields
from pipelines.components import Network, Pipeline, read_index

INDEX = "experts.json"
LIMIT = (
    "Plain diffusers calls the last of {} networks alone: `pipelines.experts.install(pipe, folder)` of "
    "distill-one-step makes it call each for its part, which experts.json names."
)


class Routes(TypedDict, total=False):
    """Content of experts.json. by: "timestep" with `bounds`, or "class_labels" with `classes`."""

    by: str
    bounds: list[float]  # decreasing timesteps between the networks
    classes: list[list[int]]  # the labels of each network


@contextmanager
def record_timesteps(student: Student) -> Iterator[list[float]]:
    """Within the context, record the timesteps of the calls of a student with experts."""
    seen: list[float] = []
    handles = []

    def record(net: nn.Module, args: tuple[object, ...], options: dict[str, object]) -> None:
        value = inspect.signature(type(net).forward).bind(net, *args, **options).arguments["timestep"]
        seen.append(float(torch.as_tensor(value).flatten()[0]))

    nets = [student.denoiser.net, *(expert.net for expert in student.experts)] if student.experts else []
    for net in nets:
        handles.append(net.register_forward_pre_hook(record, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def write(student: Student, net: nn.Module, steps: Sequence[float], network: str, folder: Path) -> bool:
    """Add a student's experts to the exported folder of its own network `net`. True if plain diffusers calls them all.

    steps: decreasing timesteps of the calls.
    """
    first, last = student.phase
    n = last - first
    bounds = [(steps[i - 1] + steps[i]) / 2 for i in range(n, first + 1, n)]
    entries = read_index(folder)
    if len(student.experts) == 1 and f"{network}_2" in entries:
        shutil.move(folder / network, folder / f"{network}_2")
        cast(Network, merge_adapters(student.experts[0].net)).save_pretrained(folder / network)
        ratio = (student.times[first - 1] + student.times[first]) / 2
        entries |= {f"{network}_2": entries[network], "boundary_ratio": ratio}
        (folder / "model_index.json").write_text(json.dumps(entries, indent=2) + "\n")
        return True
    for i, expert in enumerate(student.experts):
        cast(Network, merge_adapters(expert.net)).save_pretrained(folder / "experts" / f"{i}")
    (folder / INDEX).write_text(json.dumps({"by": "timestep", "bounds": bounds}))
    return False


def install(pipe: Pipeline, folder: str | Path) -> Pipeline:
    """Make `pipe`, loaded from `folder`, call the network that experts.json names for each row of a batch.

    Without experts.json it stays unchanged. If a batch needs several experts, each runs on the full batch, so that
    results do not depend on the composition of the batch.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        return pipe
    facts = read_routes(path)
    net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    count = len(facts["bounds"]) if facts["by"] == "timestep" else len(facts["classes"]) - 1
    others = [_load_expert(net, path.parent / "experts" / f"{i}") for i in range(count)]
    net.add_module("experts", nn.ModuleList(others).eval())  # so that they move with it
    signature = inspect.signature(net.forward)
    calls = [*others, net.forward]

    def forward(*args: object, **options: object) -> object:
        given = torch.as_tensor(signature.bind(*args, **options).arguments[facts["by"]]).reshape(-1)
        which = select_network(facts, given)
        if len(each := which.unique().tolist()) == 1:
            return calls[each[0]](*args, **options)
        made = {k: calls[k](*args, **options) for k in each}
        mixed = made[each[0]][0]
        for k in each[1:]:
            mixed = torch.where((which == k).reshape(-1, *[1] * (mixed.ndim - 1)), made[k][0], mixed)
        return (mixed,) if isinstance(made[each[0]], tuple) else type(made[each[0]])(mixed)

    net.forward = forward
    return pipe


def _load_expert(net: Network, folder: Path) -> Network:
    """A network of the class of `net` in its precision."""
    try:
        return type(net).from_pretrained(folder, torch_dtype=net.dtype, use_safetensors=True, local_files_only=True)
    except Exception as error:  # a class may raise anything for unusable weights or configs
        raise ValueError(f"{folder} cannot be read: {error}: export or copy the folder again") from None


def read_routes(path: Path) -> Routes:
    """experts.json: "by" "timestep" with decreasing "bounds", or "class_labels" with the "classes" of each network."""
    facts = fields.read(path)
    bounds = facts.get("bounds")
    classes = facts.get("classes")
    by = facts.get("by")
    falling = isinstance(bounds, list) and all(map(fields.is_number, bounds)) and sorted(bounds, reverse=True) == bounds
    parts = isinstance(classes, list) and len(classes) > 1 and all(map(are_labels, classes))
    if not (by == "timestep" and falling or by == "class_labels" and parts):
        raise ValueError(f"{path} is damaged: it says no bounds of timesteps, nor classes: export or copy it again")
    return cast(Routes, facts)


def are_labels(value: object) -> TypeGuard[list[int]]:
    """Whether a value is a list of labels."""
    return (
        isinstance(value, list) and bool(value) and all(fields.is_whole_number(one, 0, fields.LONGEST) for one in value)
    )


def select_network(facts: Routes, given: Tensor) -> Tensor:
    """The index of the network for each timestep or label."""
    if facts["by"] == "timestep":
        bounds = torch.tensor(facts["bounds"], device=given.device)
        return (given[:, None] < bounds).sum(1)
    which = torch.full_like(given, len(facts["classes"]) - 1)
    for k, classes in enumerate(facts["classes"]):
        which[torch.isin(given, torch.tensor(classes, device=given.device))] = k
    return which


@dataclass(frozen=True)
class Arguments:
    """Combine the students of all groups of classes (--data.classes) in one pipeline."""

    students: Annotated[tuple[str, ...], tyro.conf.Positional]  # exported folders of the students
    output_dir: str = ""  # folder to write


def gather_students(students: Sequence[str | Path], out: Path) -> None:
    """Write the pipeline of all students to the new folder `out`. ValueError if their classes are not a partition."""
    folders = [Path(student) for student in students]
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} student(s) are given; a pipeline of several is made of two or more folders")
    if not str(out).strip(".") or out.exists():
        raise ValueError(f"output_dir is {str(out)!r}; it must name a folder that does not exist yet")
    classes = _partition(folders)
    *others, last = folders
    network = "unet" if "unet" in read_index(last) else "transformer"
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(last, partial, ignore=shutil.ignore_patterns("*_*step_*", "samples.png", "README.md"))
        for i, folder in enumerate(others):
            shutil.copytree(folder / network, partial / "experts" / f"{i}")
        (partial / INDEX).write_text(json.dumps({"by": "class_labels", "classes": classes}))
        partial.rename(out)
    except BaseException:  # for example a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _partition(folders: Sequence[Path]) -> list[list[int]]:
    """The classes of each student. ValueError if they overlap, or if the students' calls differ."""
    facts = [fields.facts(folder) for folder in folders]
    if bare := [f"{f}" for f, fact in zip(folders, facts, strict=True) if not fact.get("student")]:
        raise ValueError(f"{bare[0]} is no exported student: it has no distill.json of one")
    classes = [_classes(folder, fact) for folder, fact in zip(folders, facts, strict=True)]
    if not all(classes) or len({c for part in classes for c in part}) < sum(map(len, classes)):
        raise ValueError(f"the students' classes are {classes}; each needs its own, --data.classes, and none has two")
    scheduled = {json.dumps(fields.read(f / "scheduler" / "scheduler_config.json"), sort_keys=True) for f in folders}
    if len(scheduled) > 1 or len({f"{fact.get('times')}" for fact in facts}) > 1:
        raise ValueError("the students have different times or schedulers; they must differ in their data alone")
    return classes


def _classes(folder: Path, facts: Mapping[str, Any]) -> list[int]:
    """The labels of a student's group, from the configuration in its distill.json; empty if it has no group."""
    path = folder / "distill.json"
    try:
        data = yaml.safe_load(facts.get("config", "")).get("data")
        found = data.get("classes") or []
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError):
        raise ValueError(f"{path} holds no configuration of a run: export the student again") from None
    if found and not are_labels(found):
        raise ValueError(f"{path} holds the classes {found!r}; they must be labels: export it again")
    return found


def main(given: Arguments | None = None) -> None:
    given = given or tyro.cli(Arguments, use_underscores=True, description=__doc__, prog=program_name())
    try:
        with folder_lock(given.output_dir, beside=True):
            gather_students(given.students, Path(given.output_dir))
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(
            f"{describe_disk_error(error) or error}: nothing of {given.output_dir} is kept; give the same command again"
        )
    sys.stderr.write(f"wrote {given.output_dir}, of {len(given.students)} students\n")
