"""Write a student as a pipeline folder for plain diffusers, then reload it and compare its images.

python -m pipelines.export runs/dmd2_sdxl                       export the newest checkpoint of a run
python -m pipelines.export runs/a --other runs/b                average the weights of two students (SwiftBrush v2)
python -m pipelines.export --from FILE --pretrained_model_name_or_path BASE --output_dir OUT      a published student
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import tyro
from safetensors import SafetensorError
from torch import nn

from distill.configuration import fail
from distill.data.labels import CLASS_NAMES
from distill.diffusion.denoiser import Condition
from distill.diffusion.end_time import fold_end_times, remove_end_time
from distill.diffusion.student import Student
from distill.files import folder_lock
from distill.layout import program_name
from distill.modules import shallow_module_copy
from distill.networks.lora import merge_adapters
from distill.networks.negative_attention import adapters, strip
from distill.training import checkpoint
from distill.training.config import StudentConfig
from distill.training.pictures import grid
from pipelines import fields
from pipelines.components import ExportError, Network, Pipeline, Scheduler
from pipelines.export import comfyui, complete, hub, kohya, single_files
from pipelines.export.card import NEGATIVE
from pipelines.export.folder import check_replaceable, write_pipeline
from pipelines.export.license import UNKNOWN
from pipelines.export.model_card import (
    CardInfo,
    absent_components,
    collect_card_info,
    describe_verification,
    render_model_card,
)
from pipelines.export.schedule import find_student_scheduler
from pipelines.export.source import ExportArguments, load_published_student, load_student_of_run
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
from pipelines.inference import controlnet, experts, negative_prompt
from pipelines.teacher import Teacher

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
    student = student.with_network(net)
    picture = controlnet.example_picture(student.denoiser, teacher)
    with experts.record_timesteps(student) as timesteps:
        expected = sample_reference(student, teacher, net, picture)
    limits = [LEGS] if any(to for _, to in student.legs) else []
    student = fold_end_times_of(student, teacher)
    net = student.denoiser.net
    others = sample_other_steps(student, teacher, picture)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        limits += write_student(student, teacher, scheduler, timesteps, partial)
        facts = {"student": True, "steps": len(student.times), "times": list(student.times), "config": card.config}
        names = {key: value for key, value in fields.facts(teacher.parts.folder).items() if key == CLASS_NAMES}
        (partial / "distill.json").write_text(json.dumps(facts | teacher.parts.asked | names, indent=1))
        files = write_single_files(student, teacher, net, partial, card)
        gaps = verify_folder(partial, files, teacher, expected, len(student.times), others)
        limits += [*files.limits, *remove_left_out(partial, files.left)]
        grid(expected.images * 2 - 1, columns=len(expected.prompts), side=256).save(partial / "samples.png")
        lora = next((file.name for file in files.made if file.stem.endswith("_lora") and file.name in gaps), "")
        beside = sorted(file.name for file in partial.iterdir() if file.is_file())
        checked = describe_verification(card, gaps, len(expected.prompts))
        text = render_model_card(student, teacher, scheduler, card, expected.prompts[0], lora, limits, beside, checked)
        (partial / "README.md").write_text(text)
    except (OSError, SafetensorError, MemoryError, RuntimeError):  # a full disk: partial files would keep it full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for file in folder.rglob("*.safetensors"):
        file.chmod((folder / "README.md").stat().st_mode)  # the library gives only the owner access
    return Verification(gaps, files.left)


def sample_other_steps(student: Student, teacher: Teacher, picture: Condition) -> dict[int, Reference]:
    """References of the folder with the further numbers of steps that the family verifies."""
    found = {}
    for n in teacher.family.verified_steps(teacher.parts):
        if n != len(student.times):
            _, times = find_student_scheduler(teacher, StudentConfig(steps=n))
            found[n] = sample_reference(replace(student, times=times), teacher, student.denoiser.net, picture)
    return found


def write_student(
    student: Student, teacher: Teacher, scheduler: Scheduler, timesteps: Sequence[float], folder: Path
) -> list[str]:
    """Write the pipeline with all networks and adapters of the student; return the card's limits about them.

    timesteps: those of the calls, if the student has experts.
    """
    denoiser = student.denoiser
    net = denoiser.net
    base = controlnet.without_controlnet(denoiser)
    plain = strip(shallow_module_copy(net)) if adapters(net) else base.net
    exported = cast(Network, teacher.family.export_network(merge_adapters(plain), replace(student, denoiser=base)))
    write_pipeline(teacher, exported, scheduler, folder)
    if adapters(net):
        negative_prompt.write(net, folder / negative_prompt.FILE)
    if base is not denoiser:
        cast(Network, net.control).save_pretrained(folder / controlnet.FOLDER)
    if student.experts and not experts.write(student, net, timesteps, teacher.parts.network, folder):
        return [experts.LIMIT.format(len(student.experts) + 1)]
    return []


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
        return replace(student, denoiser=remove_end_time(denoiser), jumps=False)
    prompt = teacher.family.examples(teacher)[0]
    device = next(denoiser.net.parameters()).device
    c = {key: value.to(device) for key, value in (teacher.encode([prompt]) or {}).items()} or None
    teacher.parts.drop_text()
    x = torch.zeros(1, *teacher.shape, device=device)
    alone = merge_adapters(denoiser.net)
    vars(alone).pop("peft_config", None)  # a LoRA file has no embedding
    found = fold_end_times(replace(denoiser, net=alone), student.legs, x, c)
    return replace(student, denoiser=found, jumps=False)


@dataclass
class SingleFiles:
    """made: files that plain diffusers loads. limits: lines of the card. left: {file that is left out: reason}."""

    made: list[Path]
    limits: list[str]
    left: dict[str, str]


def verify_folder(
    folder: Path,
    files: SingleFiles,
    teacher: Teacher,
    expected: Reference,
    steps: int,
    others: dict[int, Reference],
) -> dict[str, Gap]:
    """Differences between the student's images and those of the folder and of each single file.

    others: references of the folder with other numbers of steps. ExportError if the folder differs too much. A single
    file that differs too much, or does not load, is added to `files.left` with the reason.
    """
    pipe = load_exported(folder, teacher, expected)
    gaps = {"pipeline": compare(pipe, teacher, expected, steps)}
    gaps |= {f"pipeline, {n} step{'s' * (n > 1)}": compare(pipe, teacher, other, n) for n, other in others.items()}
    if wrong := {name: gap for name, gap in gaps.items() if not gap.largest <= TOLERANCE}:
        message = ", ".join(f"{name} by {gap.largest:.2g} (limit {TOLERANCE})" for name, gap in wrong.items())
        raise ExportError(f"the exported pipeline differs from the student: {message}; see {folder}")
    for file in files.made:
        try:
            gap = compare(load_single_file(pipe, teacher, file), teacher, expected, steps)
        except Exception as error:  # LoRA loaders raise many kinds of errors
            files.left[file.name] = f"diffusers does not load it ({type(error).__name__}: {error})"
            continue
        if gap.largest <= LARGEST and gap.psnr >= PSNR:
            gaps[file.name] = gap
        else:
            files.left[file.name] = f"its images differ from the student's by {gap} (allowed {LARGEST} and {PSNR:g} dB)"
    return gaps


def load_exported(folder: Path, teacher: Teacher, expected: Reference) -> Pipeline:
    """The folder as plain diffusers loads it, with its experts and adapters, and with the reference's control image."""
    from diffusers import DiffusionPipeline

    absent = dict.fromkeys(absent_components(teacher))
    options = {"dtype": torch.float32, "local_files_only": True}  # text encoders and VAE may be stored in half
    pipe = experts.install(DiffusionPipeline.from_pretrained(folder, **options, **absent), folder)
    if expected.negative is not None:
        pipe = negative_prompt.install(pipe, folder / negative_prompt.FILE)
    pipe = controlnet.load_with_controlnet(pipe, folder, **options, **absent)
    pipe = place_pipeline(pipe, verification_device(teacher.parts.net))
    pipe.safety_checker = None  # SD 1.x's: it blackens images that it considers harmful
    return controlnet.with_picture(pipe, expected.extra)


def refuse_single_files(student: Student, teacher: Teacher, net: nn.Module) -> list[str] | None:
    """The card's limits of a student that no single file can hold; None for any other student."""
    if isinstance(student.denoiser.call, controlnet.ControlledCall):
        return [controlnet.LIMIT]
    if not (teacher.family.lora_targets and teacher.family.single_files):
        return list(teacher.family.limits(net))
    if adapters(net):
        return [negative_prompt.LIMIT]
    ours, base = (dict(cast(Network, network).config) for network in (net, teacher.parts.net))
    other = any(ours.get(key) != base.get(key) for key in {*ours, *base} if not key.startswith("_"))
    if student.experts or other:
        return [
            NEGATIVE,
            "There are no single files: these would need the base's network config, and the student's differs.",
        ]
    return None


def write_single_files(student: Student, teacher: Teacher, net: nn.Module, folder: Path, card: CardInfo) -> SingleFiles:
    """Write the network and the LoRA as files that load into plain diffusers, ComfyUI and A1111."""
    import diffusers

    if (reasons := refuse_single_files(student, teacher, net)) is not None:
        return SingleFiles([], reasons, {})
    kind = student.denoiser.kind
    files = SingleFiles([], [NEGATIVE], {})
    size = teacher.shape[-1] * factor(teacher.parts), teacher.shape[-2] * factor(teacher.parts)
    spec = lambda lora: single_files.modelspec(net, kind, card.name, size, lora, license=card.license.id)
    name = lambda what: single_files.file_name(card.name, len(student.times), what)
    part = single_files.network_name(net)
    add = lambda what, to: try_write(folder / name(what), lambda file: to(net, file, spec(what != part)), files)
    add(part, single_files.write_network_file)
    adapted = hasattr(net, "peft_config")
    loads_lora = hasattr(getattr(diffusers, teacher.parts.index["_class_name"]), "load_lora_weights")
    if adapted and loads_lora:
        add("lora", single_files.write_lora_file)
    elif adapted:
        files.limits.append(
            "There is no LoRA file: its diffusers pipeline cannot load one. It is merged into the network."
        )
    if part == "unet":
        loaded = {"lora": name("lora_comfy")} if adapted else {"unet": name("unet")}
        try:
            flow = comfyui.build_workflow(student, "BASE.safetensors", size=size, **loaded)
            (folder / f"{card.name}_{len(student.times)}step_comfyui.json").write_text(json.dumps(flow, indent=1))
        except ValueError as error:
            files.limits.append(f"There is no workflow for ComfyUI: {error}.")
    if part == "unet" and adapted:
        add("lora_comfy", kohya.write_lora_file)
    elif complete.is_supported(student.denoiser):
        metadata = spec(False) | {"modelspec.implementation": complete.IMPLEMENTATION}
        write = lambda file: complete.write_complete_file(net, teacher.parts, file, metadata)
        try_write(folder / name("checkpoint"), write, files)
    return files


def try_write(file: Path, write: Callable[[Path], object], files: SingleFiles) -> None:
    """Add `file` to the files after `write(file)`; if that fails, add the reason."""
    try:
        write(file)
    except (ValueError, OSError, SafetensorError) as error:
        for path in (file, file.with_name(f".{file.name}.partial")):
            path.unlink(missing_ok=True)
        files.left[file.name] = checkpoint.describe_disk_error(error) or f"{error}"
    else:
        files.made.append(file)


def load_single_file(pipe: Pipeline, teacher: Teacher, file: Path) -> Pipeline:
    """The pipeline with the weights of one single file, loaded by diffusers on the teacher's network."""
    import diffusers
    from safetensors.torch import load_file

    parts = teacher.parts
    pipe.remove_all_hooks()
    pipe.register_modules(**{parts.network: None})  # free the previous network before loading the next
    if file.stem.endswith("_checkpoint"):
        options = {"config": f"{file.parent}", "local_files_only": True, "torch_dtype": torch.float32}
        options |= dict.fromkeys({"safety_checker"} & parts.index.keys())
        made = getattr(diffusers, parts.index["_class_name"]).from_single_file(f"{file}", **options)
        return place_pipeline(made, verification_device(made.unet))
    net = parts.component(parts.network, torch.float32)
    pipe.register_modules(**{parts.network: net})
    if file.stem.endswith(parts.network):
        net.load_state_dict(load_file(file))
    else:
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    return place_pipeline(pipe, verification_device(net))


def main(arguments: ExportArguments | None = None) -> None:
    arguments = arguments or tyro.cli(ExportArguments, use_underscores=True, description=__doc__, prog=program_name())
    from pipelines.launch import silence_libraries

    if bool(arguments.run) == bool(arguments.published):
        fail("give a run's folder, or a published student with --from FILE and its base")
    if arguments.published and not arguments.output_dir:
        fail("a published student needs --output_dir, the folder to write")
    if arguments.published and not arguments.teacher:
        fail("a published student needs its base: --pretrained_model_name_or_path, a folder or a name on the Hub")
    out = Path(arguments.output_dir or f"{arguments.run}/pipeline")
    name = (out.parent if out.name == "pipeline" else out).resolve().name
    try:
        silence_libraries()
        with folder_lock(out, beside=True):
            export_from_arguments(arguments, out, name)
    except (ValueError, ExportError) as error:
        fail(str(error))
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if not (why := checkpoint.describe_disk_error(error)):
            raise
        fail(f"{why} and give the same command again")


def export_from_arguments(arguments: ExportArguments, out: Path, name: str) -> None:
    """Write the pipeline folder `out`, and push it if the arguments say so."""
    check_replaceable(out)
    if arguments.published and arguments.push_to_hub and not arguments.license:
        raise ValueError("--push_to_hub: the licence of a published student is its publisher's: pass it by --license")
    repository = None
    if arguments.push_to_hub:
        repository = hub.create_repository(arguments.hub_model_id or name, arguments.hub_private)
    source = load_student_of_run(arguments) if arguments.run else load_published_student(arguments)
    base = source.base
    public = arguments.push_to_hub and not arguments.hub_private
    card = collect_card_info(
        name, source.teacher, base, source.method, source.config, arguments.license, repository, public
    )
    if arguments.published:
        named = Path(base).name if Path(base).exists() else base
        reference = f"the weights of {Path(arguments.published).name}, as they were read, on {named}"
        card = replace(card, source=reference, notes=source.notes)
    if arguments.published and not arguments.license:
        card = replace(card, license=UNKNOWN)  # that of its publisher, which no file names
    net = source.student.denoiser.net
    report_export(out, export(source.student, source.teacher, net, source.scheduler, out, card), card)
    if repository:
        sys.stderr.write(f"pushed to {hub.push_folder(out, repository)}\n")


def report_export(folder: Path, found: Verification, card: CardInfo) -> None:
    """Print the written files, the reference, and the differences of their images."""
    lines = [f"exported {folder}. Plain diffusers loaded it again; from the same noise its images differ from those"]
    lines += [f"of the training code's sampler with {card.source} (images in [0, 1]: largest difference, PSNR):"]
    lines += [f"  {gap.largest:.1e}  {gap.psnr:5.1f} dB  {name}" for name, gap in found.gaps.items()]
    lines += [f"left out {name}: {why}" for name, why in found.left.items()]
    sys.stderr.write("\n".join([*lines, *card.notes, ""]))
