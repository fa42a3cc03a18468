"""The students that can be exported: that of a run's checkpoint, and one that others published."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
import yaml

from distill import history, methods
from distill.configuration import TEACHER, from_tree, read_run_config
from distill.diffusion.end_time import SECOND, add_end_time
from distill.diffusion.student import Student
from distill.method import Requirement
from distill.networks.lora import merge_adapters
from distill.ranges import UnitInterval
from distill.training import checkpoint
from distill.training.build import earlier_experts, student_network
from distill.training.checkpoint import TensorReader
from distill.training.config import StudentConfig
from pipelines.components import Scheduler
from pipelines.export import published
from pipelines.export.schedule import find_student_scheduler
from pipelines.families.schedulers import zero_terminal
from pipelines.inference import controlnet
from pipelines.teacher import Teacher, load_teacher


@dataclass(frozen=True)
class ExportArguments:
    """Export a run's newest checkpoint, or a published student, as a verified pipeline folder."""

    run: Annotated[str, tyro.conf.Positional] = ""  # folder of a run, with its config.yaml
    checkpoint: str = "latest"  # "latest", or checkpoint-N of the run
    other: str = ""  # another run with the same teacher and student; the export averages both weights
    share: UnitInterval = 0.5  # weight of `run` in that average; the other run has 1 - share (SwiftBrush v2: .5)
    published: Annotated[str, tyro.conf.arg(name="from")] = (
        ""  # instead of a run: a student published by others, as a file or its folder
    )
    layout: Literal["dmd2", "lightning", "lcm"] | None = None  # method of that student; None: from the file's name
    steps: int | None = None  # number of network calls of that student; None: from the file's name
    teacher: Annotated[str, TEACHER] = ""  # folder or Hub name of that student's base; for a run: the moved teacher
    variant: str | None = None  # variant of the base's weight files, for example fp16
    resolution: int | None = None  # pixels per side; None: the base's training resolution
    output_dir: str = ""  # output folder; replaces an earlier export; "": `pipeline` in the run's folder
    push_to_hub: bool = False  # upload the verified export
    hub_model_id: str | None = None  # user/name; None: the name of the run or of output_dir
    hub_private: bool = False  # create the repository on the Hub as a private one
    license: str | None = None  # license of the student if the teacher's is unknown: apache-2.0 or NAME,URL


class Source(NamedTuple):
    """A student to export. base: the teacher's folder or name; config: YAML; notes: sentences about its file."""

    student: Student
    teacher: Teacher
    scheduler: Scheduler
    base: str
    method: str
    config: str
    notes: tuple[str, ...] = ()


def load_student_of_run(arguments: ExportArguments) -> Source:
    """The averaged student of a run's checkpoint."""
    run = Path(arguments.run)
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"no run at {arguments.run!r}: a run's folder has a config.yaml, its checkpoints are --checkpoint"
        )
    text, method, tree = read_run_config(run)
    method = method.lower()
    folder = find_checkpoint(run, arguments.checkpoint)
    base = arguments.teacher or tree["teacher"]
    teacher = load_teacher(
        base,
        tree.get("revision"),
        tree.get("variant"),
        tree.get("resolution"),
        tree.get("frames"),
        guidance_embedded=embeds_guidance(method, tree["method"]),
    )
    config = from_tree(StudentConfig, tree["student"])
    recorded = (history.last_entry(run) or {}).get("times")  # set by the method, if no flag gave them
    if config.times is None and recorded:
        config = replace(config, times=tuple(recorded))
    if "control" in tree["method"]:
        controlnet.install_adapter(teacher)
    scheduler, times = find_student_scheduler(teacher, config)
    student = load_student(teacher, config, times, folder)
    if arguments.other:
        other = replace(arguments, run=arguments.other, other="", checkpoint="latest")
        student = average_students(student, load_student_of_run(other).student, arguments.share)
        text += yaml.safe_dump({"other": arguments.other, "share": arguments.share})
    return Source(student, teacher, scheduler, base, method, text)


def find_checkpoint(run: Path, name: str) -> Path:
    """The folder of a checkpoint of a run; name: "latest" or checkpoint-N. ValueError if there is none."""
    intact = checkpoint.list_intact_checkpoints(run)
    if not intact:
        raise ValueError(f"{run} has no checkpoint yet: go on training with --resume_from_checkpoint latest")
    if Path(name).name == "latest":
        return intact[-1]
    for folder in intact:
        if folder.name == Path(name).name:
            return folder
    raise ValueError(f"no checkpoint {name!r} in {run}; there are {[f.name for f in intact]}")


def load_student(teacher: Teacher, config: StudentConfig, times: tuple[float, ...], folder: Path) -> Student:
    """The student of a checkpoint's folder with its averaged weights."""
    denoiser = replace(teacher.denoiser, net=student_network(config, teacher.denoiser.net))
    files = [TensorReader(file) for file in checkpoint.weight_files(folder, "student")]
    jumps = any(key.startswith(SECOND) for file in files for key in file.shapes)
    denoiser = add_end_time(denoiser) if jumps else denoiser
    checkpoint.load_initial_weights(denoiser.net, folder, "student", teacher.denoiser.net)
    experts = earlier_experts(config, teacher.denoiser)
    return Student(denoiser, times, config.scale, config.renoise, config.phases, experts, jumps)


def average_students(a: Student, b: Student, share: float) -> Student:
    """The student with weights share A + (1 - share) B and merged adapters. Both students must have the same call
    levels.

    ValueError if they do not: averaging makes sense only if both started from the same weights.
    """
    ours, theirs = ((s.times, s.input_scale, s.renoise) for s in (a, b))
    if ours != theirs:
        raise ValueError(f"the other student's calls are (times, scale, noise) {theirs}, this one's {ours}: not mixed")
    net = merge_adapters(a.denoiser.net)
    other = merge_adapters(b.denoiser.net).state_dict()
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(other[name].to(tensor), 1 - share)
    return a.with_network(net)


def embeds_guidance(method: str, values: dict[str, object]) -> bool:
    """Whether a method of this name with these values gives its student a guidance input."""
    known = {name.lower(): getattr(methods, name) for name in methods.__all__}
    w = values.get("guidance")
    if not isinstance(w, list) or method not in known:
        return False
    options = {"embed": values["embed"]} if "embed" in values else {}
    return Requirement.GUIDANCE_EMBEDDING in known[method](guidance=tuple(w), **options).requirements


def load_published_student(arguments: ExportArguments) -> Source:
    """A third-party student on its base. The notes tell which parts of its file were used."""
    path = Path(arguments.published)
    if not path.exists():
        raise ValueError(f"no file or folder at {arguments.published!r}")
    layout = published.identify_layout(path, arguments.layout, arguments.steps)
    teacher = load_teacher(arguments.teacher, None, arguments.variant, arguments.resolution, None)
    last = float(teacher.denoiser.schedule.native(torch.ones(1).double()))
    config = StudentConfig(
        steps=len(layout.indices),
        timestep=layout.indices[0] if len(layout.indices) == 1 else None,
        scale=layout.scale,
        renoise=layout.renoise,
        times=tuple(n / last for n in layout.indices),
    )
    found = published.read_published(path, teacher.denoiser.net)
    layout = published.check_agreement(found, layout, teacher.denoiser, zero_terminal(teacher.parts.scheduler()))
    net = published.network_with_weights(teacher.denoiser.net, found.weights)
    denoiser = replace(teacher.denoiser, net=net, kind=layout.kind)
    scheduler, times = find_student_scheduler(replace(teacher, denoiser=denoiser), config)
    student = Student(denoiser, times, layout.scale, layout.renoise)
    facts = yaml.safe_dump({"from": path.name, "student": {**asdict(layout), "indices": [*layout.indices]}})
    notes = (*found.notes, "Nothing was compared with images of its publishers.")
    return Source(student, teacher, scheduler, arguments.teacher, arguments.layout or "", facts, notes)
