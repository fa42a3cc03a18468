"""A student as a pipeline folder that plain diffusers loads; reloaded and compared before it is called done.

python -m pipelines.export runs/dmd2_sdxl                       again, from the newest checkpoint of a run
python -m pipelines.export --from FILE --pretrained_model_name_or_path BASE --output_dir OUT      a published student
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.draw import Draw
from distill.log import grid
from distill.lora import merged
from distill.student import Student
from pipelines import FAMILIES, ExportError, Teacher, comfy, files, kohya
from pipelines.card import NEGATIVE, Result, card, code
from pipelines.latents import factor
from pipelines.license import License

TOLERANCE = 1e-3  # largest difference of an image in [0, 1]
HALF = 3e-2  # of files whose weights are rounded to half precision
EXAMPLES = ("a photo of a red fox in the snow", "an old man reading a newspaper under a lamp")


@dataclass(frozen=True)
class Reference:
    """What the trainer's own sampler makes of stored noise: z [n, *shape], images [n, C, (T,) H, W] in [0, 1]."""

    prompts: tuple[Any, ...]
    z: Tensor
    images: Tensor


class Generated(Draw):
    """Noise in the order in which a diffusers pipeline takes it from torch's global generator."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(0, 0, "export", torch.zeros(0))
        self.unpacked = getattr(teacher.parts.family, "unpacked", lambda shape: torch.randn(shape))

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.unpacked(shape)


@torch.no_grad()
def reference(student: Student, teacher: Teacher, net: nn.Module) -> Reference:
    """Samples of the student with the weights `net`, one by one, from noise of fixed seeds."""
    prompts = getattr(teacher.parts.family, "EXAMPLES", EXAMPLES)
    device, noise, found = next(net.parameters()).device, Generated(teacher), []
    z = torch.randn(len(prompts), *teacher.shape, generator=torch.Generator().manual_seed(0))
    for i, prompt in enumerate(prompts):
        c = {key: value.to(device) for key, value in (teacher.encode([prompt]) or {}).items()}
        with torch.random.fork_rng():
            torch.manual_seed(i)
            found.append(teacher.decode(student.using(net).generate(z[i : i + 1].to(device), c or None, noise)).cpu())
    return Reference(tuple(prompts), z, (torch.cat(found).float() / 2 + 0.5).clamp(0, 1))


@torch.no_grad()
def compare(pipe: Any, teacher: Teacher, expected: Reference, steps: int) -> float:
    """Largest difference between a pipeline's images and the reference; nan where one is not finite."""
    family, gaps = teacher.parts.family, []
    pipe.set_progress_bar_config(disable=True)
    for i, prompt in enumerate(expected.prompts):
        with torch.random.fork_rng():
            torch.manual_seed(i)
            z = expected.z[i : i + 1].to(pipe.device)
            image = family.sample(pipe, [prompt], z, steps, family.UNCONDITIONAL)
        gaps.append((image.float().cpu().clamp(0, 1) - expected.images[i : i + 1]).abs().max())
    return float(torch.stack(gaps).max())


@dataclass(frozen=True)
class About:
    """What a model card says of a student beyond its weights. config: the resolved configuration, YAML."""

    name: str  # of the student, in titles and file names
    base: str | Path  # the teacher: a name on the Hub or a folder
    license: License
    method: str
    config: str = ""
    model: str | Path | None = None  # where the card loads it from; None: the folder itself
    results: Sequence[Result] = ()


def export(
    student: Student, teacher: Teacher, net: nn.Module, scheduler: Any, folder: Path, about: About
) -> dict[str, float]:
    """Write `net` (the student's averaged weights) as a pipeline folder; {file: largest image difference}.

    Text encoders, tokenizers and VAE are the teacher's files, byte for byte; ours are the network and `scheduler`
    (pipelines/scheduler.py). Latent families also get single files: the network in half precision, and a LoRA's.
    Everything is read back by plain diffusers and compared with the student's own samples: an ExportError, and no
    folder, if anything differs.
    """
    from diffusers import DiffusionPipeline

    expected, steps, family = reference(student, teacher, net), len(student.times), teacher.parts.family
    device, whole, scheduler_name = next(net.parameters()).device, merged(net), type(scheduler).__name__
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    told = getattr(family, "exported", lambda net, student: net)
    write(teacher, told(whole, student), scheduler, partial)
    facts = {"student": True, "steps": steps, "times": list(student.times), "config": about.config}
    (partial / "distill.json").write_text(json.dumps(facts, indent=1))
    pipe = DiffusionPipeline.from_pretrained(partial, local_files_only=True).to(device)
    gaps = {"pipeline": compare(pipe, teacher, expected, steps)}
    made, limits, lora = [], [NEGATIVE], ""
    if hasattr(family, "TARGETS"):
        made, refused = singles(student, teacher, net, partial, about)
        limits += [f"ComfyUI: {refused}"] if refused else []
        for file in made:
            gaps[file.name] = compare(loaded(pipe, teacher, file), teacher, expected, steps)
            lora = file.name if file.name.endswith("lora.safetensors") else lora
    limit = lambda name: TOLERANCE if name == "pipeline" else HALF
    if wrong := {name: gap for name, gap in gaps.items() if not gap <= limit(name)}:
        told_all = ", ".join(f"{name} by {gap:.2g} (limit {limit(name)})" for name, gap in wrong.items())
        raise ExportError(f"the exported pipeline differs from the student: {told_all}; see {partial}")
    grid(frames(expected.images) * 2 - 1, columns=len(expected.prompts), side=256).save(partial / "samples.png")
    call = family.snippet(steps, expected.prompts[0])
    model = about.model or folder
    text = card(
        about.name,
        about.base,
        about.license,
        FAMILIES[teacher.parts.index["_class_name"]],
        about.method,
        steps,
        about.config,
        code=code(call, model),
        lora=code(call, model, about.base, lora, scheduler_name) if lora else "",
        task=getattr(family, "TASK", "text-to-image"),
        samples="samples.png",
        prompt=str(expected.prompts[0]),
        limits=limits if hasattr(family, "TARGETS") else (),
        results=about.results,
    )
    (partial / "README.md").write_text(text)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return gaps


def singles(
    student: Student, teacher: Teacher, net: nn.Module, folder: Path, about: About
) -> tuple[list[Path], str | None]:
    """(files that load into plain diffusers, why ComfyUI cannot run the student if it cannot)."""
    steps, kind = len(student.times), student.denoiser.kind
    size = tuple(side * factor(teacher.parts) for side in teacher.shape[:-3:-1])
    spec = lambda lora: files.modelspec(net, kind, about.name, size, lora, license=about.license.id)
    name = lambda what: files.file_name(about.name, steps, what)
    part, adapted, refused = files.part(net), hasattr(net, "peft_config"), None
    made = [files.unet_file(net, folder / name(part), spec(False))]
    if adapted:
        made.append(files.lora_file(net, folder / name("lora"), spec(True)))
    if part == "unet":
        given = {"lora": name("lora_comfy")} if adapted else {"unet": name("unet")}
        try:
            flow = comfy.workflow(student, "BASE.safetensors", size=size, **given)
        except ValueError as error:
            refused = str(error)
        else:
            (folder / f"{about.name}_{steps}step_comfyui.json").write_text(json.dumps(flow, indent=1))
        if adapted:
            kohya.lora_file(net, folder / name("lora_comfy"), spec(True))
            made.append(folder / name("lora_comfy"))
    return made, refused


def loaded(pipe: Any, teacher: Teacher, file: Path) -> Any:
    """The pipeline with the weights of one single file, as diffusers loads it on the teacher's network."""
    from safetensors.torch import load_file

    parts = teacher.parts
    net = parts.component(parts.network, torch.float32).to(pipe.device)
    pipe.register_modules(**{parts.network: net})
    if "lora" in file.stem:
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    else:
        net.load_state_dict(load_file(file))
    return pipe


def frames(images: Tensor) -> Tensor:
    """Pictures as they are; of every video [B, C, T, H, W] its first, middle and last picture, side by side."""
    if images.ndim == 4:
        return images
    picked = images[:, :, [0, images.shape[2] // 2, -1]]
    return torch.cat(picked.unbind(2), dim=-1)


def write(teacher: Teacher, net: nn.Module, scheduler: Any, folder: Path) -> None:
    """The pipeline folder of the teacher with another network and scheduler."""
    parts = teacher.parts
    index = dict(parts.index)
    for name, entry in parts.index.items():
        if isinstance(entry, list) and entry[0] is not None and name not in (parts.network, "scheduler"):
            copy(parts.folder / name, folder / name, parts.variant)
    for file in parts.folder.glob("LICENSE*"):
        shutil.copy(file, folder / file.name)
    net.save_pretrained(folder / parts.network, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index["_name_or_path"] = ""
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")  # model.safetensors, not model.fp16.safetensors
WEIGHTS = re.compile(r".+\.(safetensors|bin|msgpack|onnx|onnx_data|h5|ckpt|pt|pth|xml)(\.index.*)?")


def copy(source: Path, target: Path, variant: str | None) -> None:
    """A component's files as they are: of several sets of weights the one that was loaded, under its plain name."""
    files = [f for f in sorted(source.rglob("*")) if f.is_file()]
    tag = f".{variant}"
    tagged = [f for f in files if variant and ".safetensors" in f.name and tag in f.name]
    for file in files:
        if WEIGHTS.fullmatch(file.name) and file not in tagged and (tagged or not PLAIN.fullmatch(file.name)):
            continue
        to = target / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if file not in tagged:
            shutil.copy(file, to)
        elif file.suffix == ".json":  # the index of the shards names them
            to.with_name(file.name.replace(tag, "")).write_text(file.read_text().replace(tag, ""))
        else:
            shutil.copy(file, to.with_name(file.name.replace(tag, "")))
