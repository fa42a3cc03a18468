"""Load and sample a pipeline. The noise of an image is independent of the other images.

Every image has a generator. It draws the first noise, in float32 on the CPU for every precision and device, and then
the noise that the scheduler adds between two calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from eval.files import shorten
from eval.images.manifest import Manifest
from eval.sampling.conditions import WITHOUT_CONDITION
from eval.sampling.cost import DENOISERS, parameters
from pipelines.components import LIBRARIES

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

    from distill.diffusion.solver import Name
    from pipelines import Teacher
    from pipelines.families.base import Family
    from pipelines.inference.stitch import SamplingStage

LOADING = Exception  # what a class raises at files that it cannot use is open-ended


def image_generator(seed: int, i: int) -> torch.Generator:
    """The generator of image i: a function of (seed, i) alone, on the CPU for every device."""
    state = np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


class Sampler(NamedTuple):
    """A model that generates images.

    make: (generators, prompts or labels), B of each -> images [B, C, H, W] in [-1, 1] (videos [B, C, T, H, W]).
    nfe: network evaluations of one image, known after the first call. facts: for the manifest.
    """

    make: Callable[[list[torch.Generator], Sequence[str | int]], Tensor]
    nfe: Callable[[], float]
    facts: Manifest


def teacher_sampler(teacher: Teacher, steps: int = 18, solver: Name = "heun", guidance: float = 1.0) -> Sampler:
    """Sample a `pipelines.Teacher` along its probability-flow ODE with one of our solvers.

    nfe: the solver's calls; twice as many under a guidance other than 0 and 1. CFG++ always calls both branches. A
    denoiser that is guided by a weaker network adds one evaluation for each call.
    """
    from distill.diffusion.guidance import CFG, WorseModelGuided
    from distill.diffusion.solver import calls, sample

    denoiser = teacher.denoiser if guidance == 1 else CFG(teacher.denoiser, guidance)
    branches = 1 if guidance in (0, 1) else 2
    n = steps if solver == "cfg++" else calls(solver, steps)
    nfe = 2 * (n - 1) + branches if solver == "cfg++" else n * branches
    nfe += n * isinstance(teacher.denoiser, WorseModelGuided)

    def make(generators: list[torch.Generator], conditions: Sequence[str | int]) -> Tensor:
        net = next(teacher.denoiser.net.parameters())
        z = torch.cat([torch.randn((1, *teacher.shape), generator=g) for g in generators]).to(net)
        c = {key: value.to(net.device) for key, value in (teacher.encode(conditions) or {}).items()}
        return teacher.decode(sample(denoiser, z, c or None, steps=steps, solver=solver))

    size = sum(p.numel() for p in teacher.denoiser.net.parameters())
    return Sampler(make, lambda: nfe, {"steps": steps, "guidance": guidance, "scheduler": solver, "parameters": size})


def pipeline_sampler(
    pipe: DiffusionPipeline,
    steps: int | None,
    guidance: float | None,
    family: Family | None = None,
    shape: Sequence[int] = (),
    own: bool = True,
) -> Sampler:
    """Sample a diffusers pipeline by its own call.

    family: of pipelines/families; the pipeline then gets its first noise, of `shape`. None: any other pipeline, which
    draws its noise by `generator`. Noise of later steps comes from the same generators, whether or not the pipeline
    hands them to its scheduler. steps, guidance: None is the pipeline's own default; own: if not, no guidance is.
    """
    pipe.set_progress_bar_config(disable=True)
    accepted = inspect.signature(type(pipe).__call__).parameters
    default = lambda *names: next((accepted[name].default for name in names if name in accepted), None)
    steps = steps or default("num_inference_steps")
    if guidance is None and own:
        guidance = default(*(["true_cfg_scale"] if family else []), "guidance_scale")
    spent = [0]
    made = [0]
    for name in DENOISERS:
        if isinstance(net := getattr(pipe, name, None), torch.nn.Module):
            net.register_forward_pre_hook(_counter(spent), with_kwargs=True)

    def make(generators: list[torch.Generator], conditions: Sequence[str | int]) -> Tensor:
        made[0] += len(generators)
        with _drawn_from(pipe.scheduler, generators):
            if family is not None:
                z = torch.cat([torch.randn((1, *shape), generator=g) for g in generators]).to(pipe.device, pipe.dtype)
                images = family.sample(pipe, conditions, z, steps, family.no_guidance if guidance is None else guidance)
            else:
                images = _call_pipeline(pipe, accepted, generators, conditions, steps, guidance)
        return images.float().cpu() * 2 - 1

    facts = {"steps": steps, "guidance": guidance, "scheduler": type(pipe.scheduler).__name__}
    return Sampler(make, lambda: spent[0] / max(made[0], 1), facts | {"parameters": parameters(pipe)})


def _call_pipeline(
    pipe: DiffusionPipeline,
    accepted: Mapping[str, inspect.Parameter],
    generators: list[torch.Generator],
    conditions: Sequence[str | int],
    steps: int | None,
    guidance: float | None,
) -> Tensor:
    """Images [B, C, H, W] or videos [B, C, T, H, W] in [0, 1] by the pipeline's own call. accepted: its parameters."""
    options: dict[str, object] = {"num_inference_steps": steps, "guidance_scale": guidance, "class_labels": conditions}
    options["batch_size"] = len(generators)
    options = {name: value for name, value in options.items() if name in accepted and value is not None}
    prompts = [conditions] if "prompt" in accepted else []
    output = pipe(*prompts, generator=generators, output_type="pt", **options)
    images = output.images if hasattr(output, "images") else output.frames.transpose(1, 2)
    return torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images


def staged_sampler(turns: Sequence[SamplingStage], facts: Manifest) -> Sampler:
    """Sample with several pipelines, one stage of the steps each (pipelines/inference/stitch.py)."""
    from pipelines.inference.stitch import stitch

    spent = [0]
    made = [0]
    nets = [turn.pipe.denoiser.net for turn in turns]
    for net in nets:
        net.register_forward_pre_hook(_counter(spent), with_kwargs=True)

    def make(generators: list[torch.Generator], conditions: Sequence[str | int]) -> Tensor:
        made[0] += len(generators)
        return stitch(turns, conditions, generators).float().cpu()

    size = sum(p.numel() for net in nets for p in net.parameters())
    return Sampler(make, lambda: spent[0] / max(made[0], 1), facts | {"parameters": size})


def _counter(spent: list[int]) -> Callable[..., None]:
    """A hook that adds the rows of every call of a network."""

    def count(net: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        first_tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim >= 3)
        spent[0] += len(first_tensor)

    return count


@contextmanager
def _drawn_from(scheduler: SchedulerMixin, generators: list[torch.Generator]) -> Iterator[None]:
    """A context in which a scheduler draws each image's noise from that image's generator.

    The pipelines of SD3, FLUX, Qwen and Wan pass no generator to their scheduler. Noise from torch's global state is
    seeded by the first image. ValueError if several images share such noise.
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


def load_pipeline(
    folder: Path,
    lora: Path | None,
    scheduler: str | None,
    scheduler_config: Mapping[str, Any],
    variant: str | None,
    dtype: torch.dtype,
    components: Sequence[tuple[str, str]] = (),
) -> DiffusionPipeline:
    """A diffusers pipeline: of a folder, with a LoRA's file and another scheduler if asked. ValueError if it fails."""
    from pipelines import fields
    from pipelines.components import read_index
    from pipelines.inference.experts import install

    entries = read_index(folder)
    cls = _pipeline_class(folder, entries)
    parts = {name: entry for name, entry in entries.items() if isinstance(entry, list)}
    absent = {name: None for name, entry in parts.items() if entry[0] is None}
    if "safety_checker" in parts:
        absent["safety_checker"] = None  # it would blacken images
    options = {"dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}
    for file in (folder / name / config for name in parts for config in ("config.json", "scheduler_config.json")):
        if file.exists():
            fields.read(file)
    try:
        pipe = cls.from_pretrained(folder, **options, **absent)
    except LOADING as error:
        raise ValueError(f"{folder} does not load as a {cls.__name__}: {_first_line(error)}") from None
    if not hasattr(getattr(pipe, "scheduler", None), "step"):
        raise ValueError(f"{folder}, a {cls.__name__}, has no scheduler, so its noise cannot be followed")
    if lora is not None:
        _load_lora(pipe, lora, folder)
    if scheduler is not None or scheduler_config:
        pipe.scheduler = _scheduler(pipe, scheduler, scheduler_config)
    _replace_components(pipe, components, folder)
    return install(pipe, folder)


def _replace_components(pipe: DiffusionPipeline, components: Sequence[tuple[str, str]], folder: Path) -> None:
    for name, other in components:
        if getattr(pipe, name, None) is None:
            raise ValueError(f"this protocol replaces {name}, which {folder} does not have; choose another protocol")
        pipe.register_modules(**{name: getattr(pipe, other)})


def _pipeline_class(folder: Path, entries: Mapping[str, Any]) -> type[DiffusionPipeline]:
    """The class of a folder's pipeline. ValueError for an unknown class and for components of other libraries."""
    import diffusers

    cls = getattr(diffusers, str(entries["_class_name"]), None)
    if cls is None:
        raise ValueError(
            f"{folder} is a {entries['_class_name']}, which diffusers {diffusers.__version__} does not have"
        )
    libraries = [entry[0] for entry in entries.values() if isinstance(entry, list)]
    if foreign := [library for library in libraries if library not in (None, *LIBRARIES)]:
        raise ValueError(f"{folder}: a component is of {foreign[0]!r}, code that is not run from here")
    return cls


def _load_lora(pipe: DiffusionPipeline, lora: Path, folder: Path) -> None:
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"diffusers' {type(pipe).__name__} loads no LoRA, so {lora} cannot be put on {folder}")
    try:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    except LOADING as error:
        raise ValueError(f"{lora} does not load onto {folder}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _scheduler(pipe: DiffusionPipeline, name: str | None, config: Mapping[str, Any]) -> SchedulerMixin:
    """The pipeline's scheduler, or one of a folder or of a class of diffusers, with some of its config replaced."""
    import diffusers

    from pipelines import fields

    cls: type[Any] | None = type(pipe.scheduler)
    base = pipe.scheduler.config
    if name is not None:
        folder = next(
            (f for f in (Path(name), Path(name) / "scheduler") if (f / "scheduler_config.json").is_file()), None
        )
        base = fields.read(folder / "scheduler_config.json") if folder else base
        class_name = base.get("_class_name") if folder else name
        cls = getattr(diffusers, str(class_name), None)
    if cls is None or not hasattr(cls, "from_config") or not hasattr(cls, "set_timesteps"):
        raise ValueError(f"scheduler is {name!r}; give a class of diffusers (LCMScheduler) or a folder that holds one")
    if unknown := sorted(set(config) - set(inspect.signature(cls.__init__).parameters)):
        raise ValueError(f"scheduler_config: {cls.__name__} has no {', '.join(unknown)}")
    for key, value in config.items():
        if allowed := fields.allowed_if_wrong(key, value, {**base, **config}):
            raise ValueError(f"scheduler_config: {key} is {shorten(value)}; it must be {allowed}")
    try:
        return cls.from_config(base, **config)
    except LOADING as error:
        raise ValueError(f"{cls.__name__} takes no scheduler_config {shorten(config)}: {_first_line(error)}") from None


def family_of(pipe: DiffusionPipeline, resolution: int | None) -> tuple[Family | None, Sequence[int]]:
    """(family, shape of a sample) of a pipeline that a family reads and samples; (None, ()) of other pipelines."""
    from pipelines.families.registry import known_pipelines
    from pipelines.inference.stitch import teacher_from_pipeline

    if type(pipe).__name__ not in known_pipelines() or type(pipe).__name__ in WITHOUT_CONDITION:
        if resolution is not None:
            raise ValueError(f"resolution cannot be chosen for a {type(pipe).__name__}; leave it out")
        return None, ()
    teacher = teacher_from_pipeline(pipe, resolution)
    return teacher.family, teacher.shape
