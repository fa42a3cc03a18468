"""A pipeline -> a folder of images. The noise of image i depends on (seed, i) alone.

python -m eval.generate --model runs/dmd2/pipeline --prompts prompts.txt --out runs/samples/dmd2
python -m eval.generate --model stabilityai/sdxl-turbo --protocol coco10k-dmd2 --steps 1 --guidance 0 --out ...
python -m eval.generate --model my_4step_lora.safetensors --base FOLDER --steps 4 --guidance 0 --prompts ... --out ...
accelerate launch -m eval.generate ...          processes share the images; a command that was killed goes on

An image is the same bits for any number of processes, any --batch, and whichever images a restart has left to make.
Sums of floats depend on how many rows a network sees at once, for kernels are chosen by that (4e-7 to 3e-6 of an image
in [0, 1] between 1 and 8 rows of the tiny pipelines, float32 on the CPU), but not on the place among the rows nor on
the neighbours (0). So every call has `rows` rows, filled up where fewer images are left; the manifest says how many.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from eval import images as folders
from eval.cost import DENOISERS, hardware, measure, parameters, store
from eval.protocols import Protocol
from eval.protocols import protocol as protocol_of

Solver = Literal["pipeline", "heun", "ddim"]
Precision = Literal["float32", "bfloat16", "float16"]
DIGITS = 10  # classes of the digits
PADS = ("QwenImagePipeline",)  # they pad prompts to the longest of a call: rows would depend on their neighbours


def generator(seed: int, i: int) -> torch.Generator:
    """The source of all randomness of image i: a function of (seed, i) alone, on the CPU for every device."""
    return torch.Generator().manual_seed(_state(seed, i))


def _state(seed: int, i: int) -> int:
    return int(np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0]) & (2**63 - 1)


class Sampler(NamedTuple):
    """How a model makes images.

    make: (generators, prompts or labels), B of each -> images [B, C, H, W] in [-1, 1] (videos [B, C, T, H, W]).
    nfe: network evaluations of one image, known after the first call. facts: for the manifest.
    """

    make: Callable[[list[torch.Generator], list[Any]], Tensor]
    nfe: Callable[[], float]
    facts: dict[str, Any]


def teacher_sampler(
    teacher: Any, steps: int = 18, solver: Literal["heun", "ddim"] = "heun", guidance: float = 1.0
) -> Sampler:
    """Samples a `pipelines.Teacher` along its probability-flow ODE, by a solver of ours.

    nfe is twice the solver's calls under guidance (other than 0 and 1).
    """
    from distill.guidance import Guided
    from distill.solver import calls, sample

    denoiser = teacher.denoiser if guidance == 1 else Guided(teacher.denoiser, guidance)
    nfe = calls(solver, steps) * (1 if guidance in (0, 1) else 2)

    def make(generators: list[torch.Generator], conditions: list[Any]) -> Tensor:
        net = next(teacher.denoiser.net.parameters())
        z = torch.cat([torch.randn((1, *teacher.shape), generator=g) for g in generators]).to(net)
        c = {key: value.to(net.device) for key, value in (teacher.encode(conditions) or {}).items()}
        return teacher.decode(sample(denoiser, z, c or None, steps=steps, solver=solver))

    return Sampler(make, lambda: nfe, {"scheduler": solver, "parameters": _count(teacher.denoiser.net)})


def pipeline_sampler(pipe: Any, steps: int, guidance: float | None, family: Any = None, shape: Any = None) -> Sampler:
    """Samples a diffusers pipeline as it is.

    family: its module of pipelines/, by which it is given its first noise, of `shape`; None: any other pipeline, which
    draws its noise by `generator`. Noise of later steps comes from the same generators, whether or not the pipeline
    hands them to its scheduler.
    """
    pipe.set_progress_bar_config(disable=True)
    accepted = inspect.signature(type(pipe).__call__).parameters
    spent, made = [0], [0]
    for name in DENOISERS:
        if isinstance(net := getattr(pipe, name, None), torch.nn.Module):
            net.register_forward_pre_hook(_counter(spent), with_kwargs=True)

    def make(generators: list[torch.Generator], conditions: list[Any]) -> Tensor:
        made[0] += len(generators)
        with _drawn_from(pipe.scheduler, generators):
            if family is not None:
                z = torch.cat([torch.randn((1, *shape), generator=g) for g in generators]).to(pipe.device, pipe.dtype)
                images = family.sample(
                    pipe, conditions, z, steps, family.UNCONDITIONAL if guidance is None else guidance
                )
                return images.float().cpu() * 2 - 1
            asked: dict[str, Any] = {
                "num_inference_steps": steps,
                "guidance_scale": guidance,
                "class_labels": conditions,
            }
            given = {name: value for name, value in asked.items() if name in accepted and value is not None}
            first = [conditions] if "prompt" in accepted else []
            found = pipe(*first, generator=generators, output_type="pt", **given)
        images = found.images if hasattr(found, "images") else found.frames.transpose(1, 2)
        return images.float().cpu() * 2 - 1

    facts = {"scheduler": type(pipe.scheduler).__name__, "parameters": parameters(pipe)}
    return Sampler(make, lambda: spent[0] / max(made[0], 1), facts)


def _counter(spent: list[int]) -> Callable[..., None]:
    """A hook that adds the rows of every call of a network."""

    def count(net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim >= 3)
        spent[0] += len(seen)

    return count


@contextmanager
def _drawn_from(scheduler: Any, generators: list[torch.Generator]) -> Iterator[None]:
    """Within, a scheduler's noise is each image's own: pipelines of SD3, FLUX, Qwen and Wan pass it no generator.

    Noise that is drawn otherwise, from torch's global state, is a function of the image where it is alone; ValueError
    where it is shared by several.
    """
    step = scheduler.step
    takes = "generator" in inspect.signature(step).parameters

    @wraps(step)  # pipelines look at the signature
    def with_noise(*args: Any, **options: Any) -> Any:
        out = args[0] if args else options["model_output"]
        each = generators * (len(out) // len(generators))  # DiT steps both halves of a guided batch
        return step(*args, **{**options, "generator": each} if takes else options)

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(generators[0].initial_seed())
        before = _global_state()
        scheduler.step = with_noise
        try:
            yield
        finally:
            scheduler.step = step
        if len(generators) > 1 and any(not torch.equal(a, b) for a, b in zip(before, _global_state(), strict=True)):
            raise ValueError(
                f"this pipeline, or its {type(scheduler).__name__}, draws noise that images of one call share: "
                "pass --rows 1"
            )


def _global_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def describe(model: Path) -> dict[str, Any]:
    """The distill.json of an exported folder; {} for others. ValueError where there is no model."""
    if not model.is_dir():
        raise ValueError(f"there is no model folder {model}; train or export one first")
    path = model / "distill.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); export the model again") from None


def model_hash(*models: Path) -> str:
    """The first 16 hex digits of the SHA-256 of the weights and configuration of folders, or of files."""
    total = hashlib.sha256()
    for model in models:
        listed = [f for f in model.rglob("*") if f.suffix in (".safetensors", ".json")] if model.is_dir() else [model]
        for file in sorted(listed):
            with file.open("rb") as stream:
                name = file.relative_to(model) if model.is_dir() else file.name
                total.update(f"{name}".encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" where tracked files differ from it; None where there is none."""
    git = ["git", "-C", f"{Path(__file__).parent}"]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + "-dirty" * bool(changes.stdout.strip())


def texts(source: str, column: str | None = None) -> list[str]:
    """Prompts as distill.data.sources.prompts reads them, or of a folder of .txt files, one each, in their order."""
    from distill.data.sources import prompts

    files = sorted(Path(source).glob("*.txt")) if Path(source).is_dir() else []
    if not files:
        return prompts(source, column)
    found = [" ".join(file.read_text("utf-8").split()) for file in files]
    if empty := [file for file, text in zip(files, found, strict=True) if not text]:
        raise ValueError(f"{empty[0]} is empty; it needs a prompt")
    return found


class Asked(NamedTuple):
    """What every image is asked for: its prompt, or its label."""

    conditions: list[Any]  # n of them
    prompts: bool

    @property
    def hash(self) -> str:
        return hashlib.blake2b(json.dumps(self.conditions).encode(), digest_size=8).hexdigest()


def asked(
    model: Path,
    protocol: Protocol | None,
    prompts: str | None,
    column: str | None,
    n: int | None,
    per_prompt: int,
    classes: int | None,
) -> Asked:
    """The prompts or labels of n images. ValueError where there are too few, or none."""
    from pipelines import index

    label = index(model)["_class_name"] in ("ConsistencyModelPipeline", "DiTPipeline")
    if protocol is not None:
        if (protocol.classes is None) == label:
            told = "prompts" if label else "labels"
            raise ValueError(f"protocol {protocol.name} gives {told}, which {model} does not take; choose another")
        count = n or protocol.n * per_prompt
        found = protocol.conditions(-(-count // per_prompt))
    elif prompts is not None:
        if label:
            raise ValueError(f"{model} takes labels, not prompts; leave out --prompts, and say --classes")
        found = texts(prompts, column)
        count = n or len(found) * per_prompt
    elif label:
        classes, count = classes or _classes(model), n or 2000
        found = [i % classes for i in range(-(-count // per_prompt))]
    else:
        raise ValueError(f"{model} takes prompts: pass --prompts FILE (.txt, one a line, .jsonl or .parquet)")
    if len(found) * per_prompt < count:
        times = f" x {per_prompt} images" if per_prompt > 1 else ""
        raise ValueError(
            f"{prompts} holds {len(found)} prompts{times}, fewer than the {count} images asked for: "
            "lower --n, or raise --per_prompt"
        )
    return Asked([found[i // per_prompt] for i in range(count)], not label)


def _classes(model: Path) -> int:
    """How many classes a network of labels knows, without "no label"."""
    known = next((c for c in (_config(model, "unet"), _config(model, "transformer")) if c), {})
    embedded = known.get("num_class_embeds") or known.get("num_embeds_ada_norm")
    null = describe(model).get("null_class")
    if embedded is None:
        return 1
    if null is not None:
        return null if null == embedded - 1 else embedded
    if embedded in (DIGITS, DIGITS + 1):
        return DIGITS
    raise ValueError(
        f"the network of {model} knows {embedded} labels; say how many are classes, --classes {embedded} or, if one "
        f"stands for none, {embedded - 1}"
    )


def _config(model: Path, part: str) -> dict[str, Any]:
    path = model / part / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def load(
    folder: Path,
    lora: Path | None,
    scheduler: str | None,
    scheduler_config: dict[str, Any],
    variant: str | None,
    dtype: torch.dtype,
    components: Sequence[tuple[str, str]] = (),
) -> Any:
    """A diffusers pipeline: of a folder, with a LoRA's file and another scheduler if asked. ValueError if it fails."""
    import diffusers

    from pipelines import index

    entries = index(folder)
    cls = getattr(diffusers, str(entries["_class_name"]), None)
    if cls is None:
        raise ValueError(
            f"{folder} is a {entries['_class_name']}, which diffusers {diffusers.__version__} does not have"
        )
    parts = {name: entry for name, entry in entries.items() if isinstance(entry, list)}
    foreign = [entry[0] for entry in parts.values() if entry[0] not in (None, *LIBRARIES)]
    if foreign:
        raise ValueError(f"{folder}: a component is of {foreign[0]!r}, code that is not run from here")
    absent = {name: None for name, entry in parts.items() if entry[0] is None}
    absent |= {"safety_checker": None} if "safety_checker" in parts else {}  # it would blacken images
    options = {"dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}
    try:
        pipe = cls.from_pretrained(folder, **options, **absent)
    except LOADING as error:
        raise ValueError(f"{folder} does not load as a {cls.__name__}: {_line(error)}") from None
    if not hasattr(getattr(pipe, "scheduler", None), "step"):
        raise ValueError(f"{folder}, a {cls.__name__}, has no scheduler, so its noise cannot be followed")
    if lora is not None:
        if not hasattr(pipe, "load_lora_weights"):
            raise ValueError(f"diffusers' {cls.__name__} loads no LoRA, so {lora} cannot be put on {folder}")
        try:
            pipe.load_lora_weights(lora.parent, weight_name=lora.name)
        except LOADING as error:
            raise ValueError(f"{lora} does not load onto {folder}: {_line(error)}") from None
    if scheduler is not None or scheduler_config:
        pipe.scheduler = _scheduler(pipe, scheduler, scheduler_config)
    for name, other in components:
        if getattr(pipe, name, None) is None:
            raise ValueError(f"this protocol replaces {name}, which {folder} does not have; choose another protocol")
        pipe.register_modules(**{name: getattr(pipe, other)})
    return pipe


LIBRARIES = ("diffusers", "transformers", "pipelines.edm_nets")
LOADING = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError)


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _scheduler(pipe: Any, name: str | None, config: dict[str, Any]) -> Any:
    """The pipeline's scheduler, or one of a folder or of a class of diffusers, with some of its config replaced."""
    import diffusers

    cls, base = type(pipe.scheduler), pipe.scheduler.config
    if name is not None:
        folder = next(
            (f for f in (Path(name), Path(name) / "scheduler") if (f / "scheduler_config.json").is_file()), None
        )
        base = json.loads((folder / "scheduler_config.json").read_text()) if folder else base
        cls = getattr(diffusers, base["_class_name"] if folder else name, None)
    if cls is None or not hasattr(cls, "from_config") or not hasattr(cls, "set_timesteps"):
        raise ValueError(f"scheduler is {name!r}; give a class of diffusers (LCMScheduler) or a folder that holds one")
    if unknown := sorted(set(config) - set(inspect.signature(cls.__init__).parameters)):
        raise ValueError(f"scheduler_config: {cls.__name__} has no {', '.join(unknown)}")
    return cls.from_config(base, **config)


def _shape(folder: Path, pipe: Any, resolution: int | None) -> tuple[Any, Any]:
    """(module of pipelines/, shape of a sample) of a known family, (None, None) of other pipelines."""
    from pipelines import FAMILIES, Parts

    if type(pipe).__name__ not in FAMILIES:
        if resolution is not None:
            raise ValueError(f"resolution cannot be chosen for a {type(pipe).__name__}; leave it out")
        return None, None
    parts = Parts(folder)
    parts.given = {name: value for name, value in pipe.components.items() if value is not None}
    return parts.family, parts.family.load(parts, resolution, None).shape


class Ranks:
    """The processes of `accelerate launch` or torchrun, or this one alone."""

    def __init__(self) -> None:
        self.accelerator, self.index, self.count = None, 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from datetime import timedelta

            from accelerate import Accelerator
            from accelerate.utils import InitProcessGroupKwargs

            patient = InitProcessGroupKwargs(timeout=timedelta(days=7))  # for one that has more left to make
            self.accelerator = Accelerator(kwargs_handlers=[patient])
            self.index, self.count = self.accelerator.process_index, self.accelerator.num_processes

    def device(self, asked: str | None) -> torch.device:
        if asked is not None or self.accelerator is None:
            return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        return self.accelerator.device

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes."""
        if self.accelerator is None:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found


def generate(
    model: str,
    out: Path,
    n: Annotated[int | None, tyro.conf.arg(aliases=["--num_images"])] = None,
    steps: int | None = None,
    solver: Solver | None = None,
    guidance: float | None = None,
    seed: int = 0,
    name: str | None = None,
    overwrite: bool = False,
    kind: Literal["teacher", "pipeline", "lora"] | None = None,
    protocol: str | None = None,
    prompts: str | None = None,
    prompt_column: str | None = None,
    per_prompt: int = 1,
    classes: int | None = None,
    base: str | None = None,
    scheduler: str | None = None,
    scheduler_config: str | None = None,
    resolution: int | None = None,
    frame: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: Precision = "float32",
    device: str | None = None,
    rows: int | None = None,
    batch: int | None = None,
    cost: Path | None = None,
) -> dict[str, Any]:
    """Sample any diffusers pipeline to a folder of images; returns its manifest.

    A folder that holds some of the same images is completed; one that holds all of them is the answer; one of another
    request is refused unless `overwrite`. Started by `accelerate launch` or torchrun, processes share the images.

    Args:
        model: a pipeline's folder or Hub name, a teacher's or a student's, or a LoRA's .safetensors file on `base`.
        out: where the images and their manifest.json go.
        n: number of images; by default the protocol's, or one for each prompt, or 2000 of labels. Under torchrun, which
            takes --n for a flag of its own, write --num_images.
        steps: by default those of an exported student; of a pipeline its own default; of an EDM teacher 18.
        solver: the pipeline as it is, or our heun (2 steps - 1 calls) or ddim (steps calls) on the teacher's ODE; by
            default heun for EDM teachers, else the pipeline.
        guidance: the pipeline's guidance_scale (true_cfg_scale); by default an exported student's none, the pipeline's
            own default; of our solvers 1, which is none.
        seed: of the noise; image i is a function of (seed, i) and its prompt or label.
        name: what tables call the model; by default its folder's name.
        overwrite: replace images that are there.
        kind: what tables take the model for; by default a teacher where a solver of ours samples it.
        protocol: which prompts or labels, how many, of which size (eval/protocols.py).
        prompts: .txt (one a line), .jsonl or .parquet file, a data set, or a folder of .txt files, one prompt each.
        prompt_column: of a table of prompts; by default text, caption or prompt.
        per_prompt: images of a prompt: that of image i is number i // per_prompt.
        classes: label of image i is i % classes, for pipelines that take labels.
        base: what a LoRA's file is put on: folder or Hub name.
        scheduler: instead of the pipeline's own: a class of diffusers, or a folder that holds one; by default that
            beside a LoRA's file, if there is one.
        scheduler_config: what differs in its config, as JSON: '{"timestep_spacing": "trailing"}'.
        resolution: pixels of a side; by default what the network was trained for.
        frame: which picture of a video is kept.
        revision: of a name on the Hub.
        variant: of the weight files: fp16.
        dtype: of the pipeline at work.
        device: cpu, cuda, cuda:1 ...; by default the process's own, cuda where there is one.
        rows: of every call of the networks: 1 by default, 50 for pixel models. It is part of what an image is, by
            rounding; more are faster.
        batch: images made and written together, by default `rows`; only multiples of `rows` waste nothing.
        cost: a file for latency, images per second in batches and peak memory (eval/cost.py), measured when the images
            are there.
    """
    out, limits = Path(out), {"n": n, "steps": steps, "per_prompt": per_prompt, "classes": classes, "rows": rows}
    for what, value in (limits | {"batch": batch}).items():
        if value is not None and value < 1:
            raise ValueError(f"{what} is {value}; it must be at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    if protocol is not None and (prompts or classes):
        raise ValueError(f"protocol {protocol} has its own prompts or labels: leave out --prompts and --classes")
    if torch.device(device or "cpu").type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but torch sees no GPU; use cpu")
    plan = protocol_of(protocol) if protocol is not None else None
    folder, lora = _located(str(model), base, revision, variant)
    about, ranks = describe(folder) if lora is None else {}, Ranks()
    student = bool(about.get("student"))
    pixels = _is_edm(folder)
    solver = solver or ("heun" if pixels and about and not student else "pipeline")
    if solver != "pipeline" and (student or lora or scheduler or scheduler_config):
        raise ValueError(f"solver is {solver}: it is for teachers, without LoRA and scheduler; use pipeline")
    if student and guidance not in (None, 0, 1):
        raise ValueError(f"guidance is {guidance}, but {model} is a student, which has its guidance built in; use 1")
    has = about.get("steps")
    if student and steps and has and steps > has:
        raise ValueError(f"steps is {steps}, but {model} was made for {has}; use 1 to {has}")
    steps = steps or has or (18 if solver != "pipeline" else None)
    rows = rows or (50 if pixels else 1)
    if rows > 1 and _class(folder) in PADS:
        raise ValueError(f"rows is {rows}, but {_class(folder)} pads prompts to the longest of a call; use 1")
    if lora is not None and scheduler is None and (lora.parent / "scheduler" / "scheduler_config.json").is_file():
        scheduler = f"{lora.parent}"
    changed = _json(scheduler_config)
    wanted = asked(folder, plan, prompts, prompt_column, n, per_prompt, classes)
    n = len(wanted.conditions)
    if ranks.index == 0:
        request = {
            "model_hash": model_hash(folder, *([lora] if lora else [])),
            "model": name or (lora.stem if lora else folder.absolute().name if Path(model).exists() else str(model)),
            "n": n,
            "steps": steps,
            "solver": solver,
            "guidance": guidance,
            "seed": seed,
            "prompts": wanted.hash,
            "protocol_hash": plan and plan.hash,
            "scheduler": scheduler,
            "scheduler_config": changed,
            "resolution": resolution,
            "frame": frame,
            "dtype": dtype,
            "rows": rows,
        }
        _begin(out, request, wanted, overwrite)
    ranks.wait()
    manifest = folders.manifest_of(out, unfinished=True)
    complete = manifest["complete"]
    if complete and cost is None:
        return manifest
    from pipelines.run import quiet

    quiet()
    place = ranks.device(device)
    precision = getattr(torch, dtype)
    if solver == "pipeline":
        pipe = load(folder, lora, scheduler, changed, variant, precision, plan.components if plan else ()).to(place)
        family, shape = _shape(folder, pipe, resolution)
        steps = steps or _default(pipe, "num_inference_steps")
        if guidance is None and not student:
            guidance = _default(pipe, *(["true_cfg_scale"] if family else []), "guidance_scale")
        sampler = pipeline_sampler(pipe, steps, guidance, family, shape)
    else:
        from pipelines import load as teacher_of

        teacher = teacher_of(folder, resolution, None, variant, precision)
        teacher.parts.device = place
        teacher.denoiser.net.to(place, precision)
        guidance = 1.0 if guidance is None else guidance
        sampler = teacher_sampler(teacher, steps, solver, guidance)
    size = plan.size if plan else None
    if not complete:
        digests, seconds, new = fill(out, sampler, wanted, seed, rows, batch or rows, ranks, size, frame)
        shares = ranks.gather((digests, seconds, new, sampler.nfe()))
    if ranks.index == 0 and not complete:
        found = {i: digest for share in shares for i, digest in share[0].items()}
        assert sorted(found) == list(range(n)), "an image is missing or was made twice"
        seconds = max(share[1] for share in shares)
        facts = {
            "kind": kind or ("lora" if lora else "pipeline" if solver == "pipeline" else "teacher"),
            "student": student or lora is not None,
            "model_hash": manifest["request"]["model_hash"],
            "steps": steps,
            "guidance": guidance,
            "solver": solver,
            "seed": seed,
            "nfe": _whole(max(share[3] for share in shares)),
            **sampler.facts,
            "protocol": protocol,
            "protocol_hash": plan and plan.hash,
            "dtype": dtype,
            "rows": rows,
            "commit": commit(),
            "hardware": hardware(place),
            "processes": ranks.count,
            "seconds": round(seconds, 3),
            "images_per_second": round(sum(share[2] for share in shares) / max(seconds, 1e-9), 3),
        }
        _finish(out, manifest, facts, [found[i] for i in range(n)])
    if ranks.index == 0 and cost is not None:
        given = lambda k: [wanted.conditions[i % n] for i in range(k)]
        make = lambda k: sampler.make([generator(seed, i) for i in range(k)], given(k))
        with torch.no_grad():
            measured = measure(make, batch or rows, device=place)
        store(cost, measured | {"nfe": _whole(sampler.nfe()), "parameters": sampler.facts["parameters"]})
    ranks.wait()
    return folders.manifest_of(out)


def fill(
    out: Path,
    sampler: Sampler,
    wanted: Asked,
    seed: int,
    rows: int,
    batch: int,
    ranks: Ranks,
    size: int | None = None,
    frame: int | None = None,
) -> tuple[dict[int, str], float, int]:
    """Make this process's share of the images that are missing, of those that are there take the digests.

    -> (digest of each image of the share, seconds of sampling, images made). size: pixels of a side that are asked for.
    """
    from tqdm import tqdm

    n = len(wanted.conditions)
    there = {file.name for file in out.glob("*.png")}
    done = [i for i in range(n) if folders.file_name(i) in there]
    left = [i for i in range(n) if folders.file_name(i) not in there]
    ranks.wait()  # all have looked before anyone writes: the shares are disjoint
    digests = {i: folders.digest(folders.level(out / folders.file_name(i))) for i in done[ranks.index :: ranks.count]}
    mine, seconds = left[ranks.index :: ranks.count], 0.0
    if not left and ranks.index == 0:  # killed before its manifest was written: one call tells its facts
        with torch.no_grad():
            sampler.make([generator(seed, 0)] * rows, wanted.conditions[:1] * rows)
    with (
        tqdm(total=n, initial=n - len(left), unit="image", leave=False, disable=ranks.index > 0) as bar,
        torch.no_grad(),
    ):
        for unit in (mine[k : k + batch] for k in range(0, len(mine), batch)):
            start, levels = time.perf_counter(), []
            for pick in (unit[k : k + rows] for k in range(0, len(unit), rows)):
                filled = pick + [pick[-1]] * (rows - len(pick))
                images = sampler.make([generator(seed, i) for i in filled], [wanted.conditions[i] for i in filled])
                levels += _levels(images[: len(pick)], pick, size, frame)
            seconds += time.perf_counter() - start
            for i, level in zip(unit, levels, strict=True):
                folders.save(out, i, level)
                digests[i] = folders.digest(level)
            bar.update(min(len(unit) * ranks.count, n - bar.n))
    return digests, seconds, len(mine)


def _levels(images: Tensor, numbers: list[int], size: int | None, frame: int | None) -> list[Tensor]:
    """Images in [-1, 1] as uint8 [C, H, W] each, of videos one picture. ValueError for what is no image."""
    if images.ndim == 5:
        if frame is None or not 0 <= frame < images.shape[2]:
            raise ValueError(
                f"this pipeline makes videos of {images.shape[2]} pictures, and frame is {frame}: "
                f"choose the one to keep, --frame 0 to {images.shape[2] - 1}"
            )
        images = images[:, :, frame]
    if size is not None and images.shape[-2:] != (size, size):
        told = " x ".join(map(str, images.shape[:-3:-1]))
        raise ValueError(f"the protocol is of {size} x {size} pixels, and these images are {told}: try --resolution")
    finite = torch.isfinite(images.flatten(1)).all(1)
    if not finite.all():
        bad = numbers[int((~finite).nonzero()[0])]
        raise ValueError(f"image {bad} holds NaN or infinite values; it was not written. Try another --dtype")
    return list(folders.quantize(images.cpu()))


def _begin(out: Path, request: dict[str, Any], wanted: Asked, overwrite: bool) -> None:
    """Make `out` a folder of this request, unless it is one: its manifest, the prompts, no leftovers."""
    old = folders.manifest_of(out, unfinished=True) if out.is_dir() else {}
    if old.get("request") == request:
        for leftover in out.glob(".*.part"):
            leftover.unlink()
        return
    if "request" in old and not overwrite:
        differ = [f"{k} {old['request'].get(k)!r}, not {v!r}" for k, v in request.items() if old["request"].get(k) != v]
        raise ValueError(
            f"{out} is not empty: it holds images of another run ({'; '.join(differ)}); choose another folder, or "
            "pass --overwrite"
        )
    folders.check_free(out, overwrite)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if wanted.prompts:
        lines = ({"file_name": folders.file_name(i), "text": text} for i, text in enumerate(wanted.conditions))
        (out / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels = None if wanted.prompts else wanted.conditions
    begun = {"complete": False, "model": request["model"], "n": request["n"], "prompts": wanted.hash, "labels": labels}
    folders.store(out, begun | {"request": request})


def _finish(out: Path, manifest: dict[str, Any], facts: dict[str, Any], digests: list[str]) -> None:
    """The manifest of the complete folder; ValueError where something else lies among its images."""
    names = sorted(file.name for file in out.glob("*.png"))
    if names != [folders.file_name(i) for i in range(manifest["n"])]:
        raise ValueError(f"{out} holds images that are not of this run; remove them, or choose another folder")
    shape = list(folders.level(out / names[0]).shape)
    whole = {"complete": True, "shape": shape, "size": shape[-1], "hash": folders.combined(digests)}
    folders.store(out, facts | manifest | whole)


def _located(model: str, base: str | None, revision: str | None, variant: str | None) -> tuple[Path, Path | None]:
    """(folder of the pipeline, file of a LoRA on it)."""
    from pipelines import located

    if not model.endswith(".safetensors"):
        if base is not None:
            raise ValueError(f"base is {base}, but {model} is no LoRA's .safetensors file; leave out --base")
        folder = located(model, revision, variant)
        describe(folder)
        return folder, None
    if not Path(model).is_file():
        raise ValueError(f"there is no LoRA file {model}")
    if base is None:
        raise ValueError(f"{model} is a LoRA: say by --base which pipeline it is put on")
    return located(base, revision, variant), Path(model)


def _class(folder: Path) -> str:
    from pipelines import index

    return str(index(folder)["_class_name"])


def _is_edm(folder: Path) -> bool:
    return _class(folder) == "ConsistencyModelPipeline"


def _default(pipe: Any, *names: str) -> Any:
    """The default of the first of these arguments that the pipeline has."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    return next((accepted[name].default for name in names if name in accepted), None)


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else round(value, 3)


def _json(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"scheduler_config is {text!r}, no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"scheduler_config is {text!r}; it must be a JSON object")
    return found


def main() -> None:
    """Command line of `generate`."""
    from eval.cli import run

    manifest = run(generate)
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{manifest['n']} images of {manifest['model']}, {manifest['nfe']} network evaluation(s) each, "
            f"{manifest['images_per_second']} images/s"
        )


if __name__ == "__main__":
    main()
