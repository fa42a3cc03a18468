"""Write a student as a pipeline folder for plain diffusers, then reload it and compare its images.

python -m pipelines.export runs/dmd2_sdxl                       export the newest checkpoint of a run
python -m pipelines.export runs/a --other runs/b                average the weights of two students (SwiftBrush v2)
python -m pipelines.export --from FILE --pretrained_model_name_or_path BASE --output_dir OUT      a published student
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
import yaml
from safetensors import SafetensorError
from torch import nn

from distill import history, methods
from distill.configuration import TEACHER, fail, from_tree, read_run_config
from distill.diffusion.end_time import SECOND, fold_end_times, timed, untimed
from distill.diffusion.student import Student
from distill.files import folder_lock
from distill.layout import program_name
from distill.method import Requirement
from distill.modules import shallow_module_copy
from distill.networks.lora import merged
from distill.networks.negative_attention import adapters, strip
from distill.ranges import UnitInterval
from distill.training import checkpoint
from distill.training.build import earlier_experts, student_network
from distill.training.checkpoint import TensorReader
from distill.training.config import StudentConfig
from distill.training.log import grid
from pipelines import fields
from pipelines.components import ExportError, Network, Pipeline, Scheduler, is_variant
from pipelines.export import comfyui, hub, kohya, single_files
from pipelines.export import published as others
from pipelines.export.card import NEGATIVE
from pipelines.export.model_card import (
    CardInfo,
    absent_components,
    collect_card_info,
    describe_verification,
    render_model_card,
)
from pipelines.export.schedule import find_student_scheduler as carrying
from pipelines.export.verify import (
    LARGEST,
    PSNR,
    TOLERANCE,
    Gap,
    Reference,
    compare,
    place_pipeline,
    sample_reference,
    verification_device,
)
from pipelines.families.latents import factor
from pipelines.families.schedulers import zero_terminal
from pipelines.inference import controlnet, experts, negative_prompt
from pipelines.teacher import Teacher, load_teacher

LEGS = (  # a limit in the model card
    "The end time of each call is part of the time embedding. So the student works only with its own number of steps, "
    "and it has no LoRA file."
)


@dataclass(frozen=True)
class Verification:
    """Result of a verification. gaps: by pipeline and single file; left: {skipped file: reason}."""

    gaps: dict[str, Gap]
    left: dict[str, str]


def export(
    student: Student, teacher: Teacher, net: nn.Module, scheduler: Scheduler, folder: Path, card: CardInfo
) -> Verification:
    """Write `net` (the student's averaged weights) as a pipeline folder. A link is followed to its folder.

    Text encoders, tokenizers and VAE are byte-for-byte copies of the teacher's files. New are the network and
    `scheduler` (pipelines/export/schedule.py). Latent families also get single files: the network in half precision,
    and a LoRA. Plain diffusers then loads everything, and the images are compared with the student's own samples. If
    the pipeline differs: ExportError, and no folder is written. A single file that differs is left out.
    """
    check_replaceable(folder)
    folder = folder.resolve()
    student = student.using(net)
    with experts.record_timesteps(student) as steps:
        expected = sample_reference(student, teacher, net)
    limits = [LEGS] if any(to for _, to in student.legs) else []
    student = fold_end_times_of(student, teacher)
    one = student.denoiser
    net = student.denoiser.net
    others = {
        n: sample_reference(replace(student, times=carrying(teacher, StudentConfig(steps=n))[1]), teacher, net)
        for n in teacher.family.verified_steps(teacher.parts)
        if n != len(student.times)
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        base = controlnet.without_controlnet(one)
        plain = strip(shallow_module_copy(net)) if adapters(net) else base.net
        exported = teacher.family.export_network(merged(plain), replace(student, denoiser=base))
        write_pipeline(teacher, exported, scheduler, partial)
        if adapters(net):
            negative_prompt.write(net, partial / negative_prompt.FILE)
        if base is not one:
            net.control.save_pretrained(partial / controlnet.FOLDER)  # type: ignore[operator,union-attr]
        if student.experts and not experts.write(student, net, steps, teacher.parts.network, partial):
            limits = [experts.LIMIT.format(len(student.experts) + 1)]
        facts = {"student": True, "steps": len(student.times), "times": list(student.times), "config": card.config}
        (partial / "distill.json").write_text(json.dumps(facts | teacher.parts.asked, indent=1))
        made, more, left = write_single_files(student, teacher, net, partial, card)
        gaps = verify_folder(partial, made, teacher, expected, len(student.times), others, left)
        limits = [*limits, *more, *remove_left_out(partial, left)]
        grid(expected.images * 2 - 1, columns=len(expected.prompts), side=256).save(partial / "samples.png")
        lora = next((file.name for file in made if file.stem.endswith("_lora") and file.name in gaps), "")
        beside = sorted(file.name for file in partial.iterdir() if file.is_file())
        where = card.model or folder
        checked = describe_verification(card, gaps["pipeline"], len(expected.prompts))
        text = render_model_card(
            student, teacher, scheduler, card, where, expected.prompts[0], lora, limits, beside, checked
        )
        (partial / "README.md").write_text(text)
    except (OSError, SafetensorError, MemoryError, RuntimeError):  # a full disk: partial files would keep it full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for file in folder.rglob("*.safetensors"):
        file.chmod((folder / "README.md").stat().st_mode)  # the library gives only the owner access
    return Verification(gaps, left)


def remove_left_out(folder: Path, left: dict[str, str]) -> list[str]:
    """Delete the single files in `left` and workflows that use them; return the card's lines about them."""
    for name in left:
        (folder / name).unlink(missing_ok=True)
    for flow in folder.glob("*_comfyui.json"):
        if any(name in flow.read_text() for name in left):
            flow.unlink()
    return [f"There is no {name}: {why}." for name, why in left.items()]


def fold_end_times_of(student: Student, teacher: Teacher) -> Student:
    """The student without end times: they are added to the time embedding at the times of its calls."""
    denoiser = student.denoiser
    if not any(to for _, to in student.legs):
        return replace(student, denoiser=untimed(denoiser), jumps=False)
    prompt = teacher.family.examples(teacher)[0]
    device = next(denoiser.net.parameters()).device
    c = {key: value.to(device) for key, value in (teacher.encode([prompt]) or {}).items()} or None
    teacher.parts.drop_text()
    x = torch.zeros(1, *teacher.shape, device=device)
    alone = merged(denoiser.net)
    vars(alone).pop("peft_config", None)  # a LoRA file has no embedding
    found = fold_end_times(replace(denoiser, net=alone), student.legs, x, c)
    return replace(student, denoiser=found, jumps=False)


def check_replaceable(folder: Path) -> None:
    """ValueError if `folder` holds anything but an earlier export, because an export replaces the whole folder."""
    try:
        folder = folder.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder} is a link that leads nowhere ({error}): choose another --output_dir") from None
    if folder.is_mount():
        raise ValueError(f"{folder} is where a disk is mounted and cannot be replaced: choose a folder inside it")
    try:
        ours = fields.facts(folder).get("student") is True
    except ValueError:  # damaged: not an export
        ours = False
    if folder.exists() and not (ours or folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an earlier export: choose another --output_dir")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} is not a writable folder: choose another --output_dir")


def verify_folder(
    folder: Path,
    made: list[Path],
    teacher: Teacher,
    expected: Reference,
    steps: int,
    others: dict[int, Reference],
    left: dict[str, str],
) -> dict[str, Gap]:
    """Differences between the student's images and those of the folder and of each single file.

    others: references of the folder with other numbers of steps. ExportError if the folder differs too much. A single
    file that differs too much, or does not load, is added to `left` with the reason.
    """
    from diffusers import DiffusionPipeline

    absent = dict.fromkeys(absent_components(teacher))
    options = {"dtype": torch.float32, "local_files_only": True}  # text encoders and VAE may be stored in half
    pipe = experts.install(DiffusionPipeline.from_pretrained(folder, **options, **absent), folder)
    if expected.negative is not None:
        pipe = negative_prompt.install(pipe, folder / negative_prompt.FILE)
    pipe = controlnet.load_with_controlnet(pipe, folder, **options, **absent)
    pipe = place_pipeline(pipe, verification_device(teacher.parts.net))
    pipe.safety_checker = None  # SD 1.x's: it blackens images that it considers harmful
    gaps = {"pipeline": compare(pipe, teacher, expected, steps)}
    gaps |= {f"pipeline, {n} step{'s' * (n > 1)}": compare(pipe, teacher, other, n) for n, other in others.items()}
    if wrong := {name: gap for name, gap in gaps.items() if not gap.largest <= TOLERANCE}:
        told = ", ".join(f"{name} by {gap.largest:.2g} (limit {TOLERANCE})" for name, gap in wrong.items())
        raise ExportError(f"the exported pipeline differs from the student: {told}; see {folder}")
    for file in made:
        try:
            gap = compare(load_single_file(pipe, teacher, file), teacher, expected, steps)
        except Exception as error:  # LoRA loaders raise many kinds of errors
            left[file.name] = f"diffusers does not load it ({type(error).__name__}: {error})"
            continue
        if gap.largest <= LARGEST and gap.psnr >= PSNR:
            gaps[file.name] = gap
        else:
            left[file.name] = f"its images differ from the student's by {gap} (allowed {LARGEST} and {PSNR:g} dB)"
    return gaps


Singles = tuple[list[Path], list[str], dict[str, str]]


def write_single_files(student: Student, teacher: Teacher, net: nn.Module, folder: Path, card: CardInfo) -> Singles:
    """(files that load into plain diffusers, limitations, {file that cannot be written: reason})."""
    import diffusers

    if isinstance(student.denoiser.call, controlnet.ControlledCall):
        return [], [controlnet.LIMIT], {}
    if not teacher.family.lora_targets:
        return [], list(teacher.family.limits(net)), {}
    if adapters(net):
        return [], [negative_prompt.LIMIT], {}
    both: list[Any] = [net, teacher.parts.net]
    ours, base = (dict(one.config) for one in both)
    other = any(ours.get(key) != base.get(key) for key in {*ours, *base} if not key.startswith("_"))
    if student.experts or other:
        return (
            [],
            [
                NEGATIVE,
                "There are no single files: these would need the base's network config, and the student's differs.",
            ],
            {},
        )
    steps = len(student.times)
    kind = student.denoiser.kind
    limits = [NEGATIVE]
    left: dict[str, str] = {}
    size = teacher.shape[-1] * factor(teacher.parts), teacher.shape[-2] * factor(teacher.parts)
    spec = lambda lora: single_files.modelspec(net, kind, card.name, size, lora, license=card.license.id)
    name = lambda what: single_files.file_name(card.name, steps, what)
    part = single_files.network_name(net)
    adapted = hasattr(net, "peft_config")
    write = lambda what, to: try_write(folder / name(what), lambda file: to(net, file, spec(what != part)), left)
    made = write(part, single_files.write_network_file)
    loads_lora = hasattr(getattr(diffusers, teacher.parts.index["_class_name"]), "load_lora_weights")
    if adapted and loads_lora:
        made += write("lora", single_files.write_lora_file)
    elif adapted:
        limits.append("There is no LoRA file: its diffusers pipeline cannot load one. It is merged into the network.")
    if part == "unet":
        given = {"lora": name("lora_comfy")} if adapted else {"unet": name("unet")}
        try:
            flow = comfyui.build_workflow(student, "BASE.safetensors", size=size, **given)
            (folder / f"{card.name}_{steps}step_comfyui.json").write_text(json.dumps(flow, indent=1))
        except ValueError as error:
            limits.append(f"There is no workflow for ComfyUI: {error}.")
        if adapted:
            made += write("lora_comfy", kohya.write_lora_file)
    elif adapted and loads_lora:
        (config,) = net.peft_config.values()  # type: ignore[operator]
        limits.append(f"ComfyUI does not read this LoRA's alpha: set its strength to {config.lora_alpha / config.r:g}.")
    return made, limits, left


def try_write(file: Path, write: Callable[[Path], Any], left: dict[str, str]) -> list[Path]:
    """[file] after `write(file)`; [] if that fails, with the reason in `left`."""
    try:
        write(file)
    except (ValueError, OSError, SafetensorError) as error:
        for path in (file, file.with_name(f".{file.name}.partial")):
            path.unlink(missing_ok=True)
        left[file.name] = checkpoint.describe_disk_error(error) or f"{error}"
        return []
    return [file]


def load_single_file(pipe: Pipeline, teacher: Teacher, file: Path) -> Any:
    """The pipeline with the weights of one single file, loaded by diffusers on the teacher's network."""
    from safetensors.torch import load_file

    parts = teacher.parts
    pipe.remove_all_hooks()
    pipe.register_modules(**{parts.network: None})  # free the previous network before loading the next
    net = parts.component(parts.network, torch.float32)
    pipe.register_modules(**{parts.network: net})
    if file.stem.endswith(parts.network):
        net.load_state_dict(load_file(file))
    else:
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    return place_pipeline(pipe, verification_device(net))


def write_pipeline(teacher: Teacher, net: Network, scheduler: Scheduler, folder: Path) -> None:
    """Write the pipeline folder of the teacher with another network and scheduler."""
    parts = teacher.parts
    index = dict(parts.index)
    for name, entry in parts.index.items():
        if isinstance(entry, list) and entry[0] is not None and name not in (parts.network, "scheduler"):
            if not copy_component(parts.folder / name, folder / name, parts.variant):
                shutil.rmtree(folder / name)
                index[name] = [None, None]
    for file in parts.folder.glob("LICENSE*"):
        shutil.copy(file, folder / file.name)
    net.save_pretrained(folder / parts.network, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index["_name_or_path"] = ""
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")  # model.safetensors, not model.fp16.safetensors
WEIGHTS = re.compile(r".+\.(safetensors|bin|msgpack|onnx|onnx_data|h5|ckpt|pt|pth|xml)(\.index.*)?")


def copy_component(source: Path, target: Path, variant: str | None) -> bool:
    """Copy the files of a component. Of several variants of the weights, copy the loaded one under its plain name.

    False if the weights exist only as pickles. These are not copied: an example is a safety checker, which nothing
    loads.
    """
    files = [f for f in sorted(source.rglob("*")) if f.is_file()]
    tag = f".{variant}"
    tagged = [f for f in files if variant and is_variant(f, variant)]
    for file in files:
        if WEIGHTS.fullmatch(file.name) and file not in tagged and (tagged or not PLAIN.fullmatch(file.name)):
            continue
        to = target / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if file not in tagged:
            shutil.copy(file, to)
        elif file.suffix == ".json":  # the index names the shards
            to.with_name(file.name.replace(tag, "")).write_text(file.read_text().replace(tag, ""))
        else:
            shutil.copy(file, to.with_name(file.name.replace(tag, "")))
    weights = lambda folder: any(WEIGHTS.fullmatch(file.name) for file in folder.rglob("*"))
    return weights(target) or not weights(source)


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


def load_student_of_run(again: ExportArguments) -> tuple[Student, Teacher, Any, str, str, str]:
    """The averaged student of a run's checkpoint, its scheduler, the teacher's name, the method and configuration."""
    run = Path(again.run)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"no run at {again.run!r}: a run's folder has a config.yaml, its checkpoints are --checkpoint")
    text, method, tree = read_run_config(run)
    method = method.lower()
    found = checkpoint.list_intact_checkpoints(run)
    if not found:
        raise ValueError(f"{run} has no checkpoint yet: go on training with --resume_from_checkpoint latest")
    named = Path(again.checkpoint).name
    chosen = found[-1:] if named == "latest" else [f for f in found if f.name == named]
    if not chosen:
        raise ValueError(f"no checkpoint {again.checkpoint!r} in {run}; there are {[f.name for f in found]}")
    base = again.teacher or tree["teacher"]
    options: dict[str, Any] = {key: tree.get(key) for key in ("revision", "variant", "resolution", "frames")}
    teacher = load_teacher(base, **options, guidance_embedded=embeds_guidance(method, tree["method"]))
    config = from_tree(StudentConfig, tree["student"])
    recorded = (history.last_entry(run) or {}).get("times")  # set by the method, if no flag gave them
    if config.times is None and recorded:
        config = replace(config, times=tuple(recorded))
    if "control" in tree["method"]:
        controlnet.install_adapter(teacher)
    scheduler, times = carrying(teacher, config)
    denoiser = replace(teacher.denoiser, net=student_network(config, teacher.denoiser.net))
    weights = [TensorReader(file) for file in checkpoint.weight_files(chosen[0], "student")]
    jumps = any(key.startswith(SECOND) for file in weights for key in file.shapes)
    denoiser = timed(denoiser) if jumps else denoiser
    checkpoint.load_initial_weights(denoiser.net, chosen[0], "student", teacher.denoiser.net)
    rest = config.phases, earlier_experts(config, teacher.denoiser), jumps
    student = Student(denoiser, times, config.scale, config.renoise, *rest)
    if again.other:
        student = average_students(
            student, load_student_of_run(replace(again, run=again.other, other="", checkpoint="latest"))[0], again.share
        )
        text += yaml.safe_dump({"other": again.other, "share": again.share})
    return student, teacher, scheduler, base, method, text


def average_students(a: Student, b: Student, share: float) -> Student:
    """The student with weights share A + (1 - share) B and merged adapters. Both students must have the same call
    levels.

    ValueError if they do not: averaging makes sense only if both started from the same weights.
    """
    ours, theirs = ((s.times, s.input_scale, s.renoise) for s in (a, b))
    if ours != theirs:
        raise ValueError(f"the other student's calls are (times, scale, noise) {theirs}, this one's {ours}: not mixed")
    net = merged(a.denoiser.net)
    other = merged(b.denoiser.net).state_dict()
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(other[name].to(tensor), 1 - share)
    return a.using(net)


def embeds_guidance(method: str, fields: dict[str, Any]) -> bool:
    """Whether a method of this name with these values gives its student a guidance input."""
    known = {name.lower(): getattr(methods, name) for name in methods.__all__}
    w = fields.get("guidance")
    if not isinstance(w, list) or method not in known:
        return False
    options = {"embed": fields["embed"]} if "embed" in fields else {}
    return Requirement.GUIDANCE_EMBEDDING in known[method](guidance=tuple(w), **options).requirements


def load_published_student(again: ExportArguments) -> tuple[Student, Teacher, Any, str, str, str, tuple[str, ...]]:
    """A third-party student on its base. The last value is notes about the parts of the file that were used."""
    path = Path(again.published)
    if not path.exists():
        raise ValueError(f"no file or folder at {again.published!r}")
    known = others.identify_layout(path, again.layout, again.steps)
    teacher = load_teacher(again.teacher, None, again.variant, again.resolution, None)
    last = float(teacher.denoiser.schedule.native(torch.ones(1).double()))
    one = known.indices[0] if len(known.indices) == 1 else None
    config = StudentConfig(
        steps=len(known.indices),
        timestep=one,
        scale=known.scale,
        renoise=known.renoise,
        times=tuple(n / last for n in known.indices),
    )
    found = others.read_published(path, teacher.denoiser.net)
    known = others.check_agreement(found, known, teacher.denoiser, zero_terminal(teacher.parts.scheduler()))
    net = others.network_with_weights(teacher.denoiser.net, found.weights)
    denoiser = replace(teacher.denoiser, net=net, kind=known.kind)
    scheduler, times = carrying(replace(teacher, denoiser=denoiser), config)
    student = Student(denoiser, times, known.scale, known.renoise)
    facts = yaml.safe_dump({"from": path.name, "student": {**asdict(known), "indices": [*known.indices]}})
    notes = (*found.notes, "Nothing was compared with images of its publishers.")
    return student, teacher, scheduler, again.teacher, again.layout or "", facts, notes


def main(again: ExportArguments | None = None) -> None:
    again = again or tyro.cli(ExportArguments, use_underscores=True, description=__doc__, prog=program_name())
    from pipelines.launch import silence_libraries

    if bool(again.run) == bool(again.published):
        fail("give a run's folder, or a published student with --from FILE and its base")
    if again.published and not again.output_dir:
        fail("a published student needs --output_dir, the folder to write")
    if again.published and not again.teacher:
        fail("a published student needs its base: --pretrained_model_name_or_path, a folder or a name on the Hub")
    out = Path(again.output_dir or f"{again.run}/pipeline")
    name = (out.parent if out.name == "pipeline" else out).resolve().name
    try:
        silence_libraries()
        with folder_lock(out, beside=True):
            export_from_arguments(again, out, name)
    except (ValueError, ExportError) as error:
        fail(str(error))
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if not (why := checkpoint.describe_disk_error(error)):
            raise
        fail(f"{why} and give the same command again")


def export_from_arguments(again: ExportArguments, out: Path, name: str) -> None:
    """Write the pipeline folder `out`, and push it if `again` says so."""
    check_replaceable(out)
    repository = hub.create_repository(again.hub_model_id or name, again.hub_private) if again.push_to_hub else None
    student, teacher, scheduler, base, method, facts, *notes = (
        load_student_of_run(again) if again.run else load_published_student(again)
    )
    card = collect_card_info(name, teacher, base, method, facts, again.license, repository)
    if again.published:
        named = Path(base).name if Path(base).exists() else base
        source = f"the weights of {Path(again.published).name}, as they were read, on {named}"
        card = replace(card, source=source, notes=notes[0])
    report_export(out, export(student, teacher, student.denoiser.net, scheduler, out, card), card)
    if repository:
        sys.stderr.write(f"pushed to {hub.push_folder(out, repository)}\n")


def report_export(folder: Path, found: Verification, card: CardInfo) -> None:
    """Print the written files, the reference, and the differences of their images."""
    lines = [f"exported {folder}. Plain diffusers loaded it again; from the same noise its images differ from those"]
    lines += [f"of the training code's sampler with {card.source} (images in [0, 1]: largest difference, PSNR):"]
    lines += [f"  {gap.largest:.1e}  {gap.psnr:5.1f} dB  {name}" for name, gap in found.gaps.items()]
    lines += [f"left out {name}: {why}" for name, why in found.left.items()]
    sys.stderr.write("\n".join([*lines, *card.notes, ""]))
