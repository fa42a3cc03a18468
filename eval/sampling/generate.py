"""A pipeline -> a folder of images. The noise of image i depends on (seed, i) alone.

python -m eval.generate --model runs/dmd2/pipeline --prompts prompts.txt --out runs/samples/dmd2
python -m eval.generate --model stabilityai/sdxl-turbo --protocol coco10k-dmd2 --steps 1 --guidance 0 --out ...
python -m eval.generate --model sdxl-dmd2 --first sdxl --prompts prompts.txt --out ...     pipelines/inference/stitch.py
python -m eval.generate --model my_4step_lora.safetensors --base FOLDER --steps 4 --guidance 0 --prompts ... --out ...
accelerate launch -m eval.generate ...          processes share the images; a killed command continues

An image is bitwise the same for any number of processes, any --batch and any images that a restart finds missing. Sums
of floats depend on the number of rows in a network's call, which selects the kernels: 4e-7 to 3e-6 of an image in
[0, 1] between 1 and 8 rows of the tiny pipelines, float32 on the CPU. They do not depend on the other rows (0). So
every call has `rows` rows: a call with fewer images repeats the last one. The manifest holds `rows`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from distill.files import folder_lock
from eval.files import check_output, read_json, shorten, write_json
from eval.images import images as folders
from eval.images.images import Manifest
from eval.protocols import Protocol, find_protocol
from eval.sampling.conditions import IMAGES, SampleConditions, label_conditions, prompt_conditions, protocol_conditions
from eval.sampling.cost import git_commit, hardware, measure_cost
from eval.sampling.sampler import (
    Sampler,
    family_of,
    image_generator,
    load_pipeline,
    pipeline_sampler,
    staged_sampler,
    teacher_sampler,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Tree = dict[str, Any]  # of a JSON file
Solver = Literal["pipeline", "heun", "ddim", "cfg++"]
FIRST = ("first", "first_steps", "first_guidance", "first_solver", "skip")
MOST = {"n": IMAGES, "steps": 10_000, "per_prompt": IMAGES, "classes": IMAGES, "rows": 10_000, "batch": 10_000,
        "first_steps": 10_000, "resolution": 1 << 14}  # fmt: skip
EDM = "ConsistencyModelPipeline"
EXPORTS = ("pipeline", "watch", "lora", "pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model")


@dataclass(frozen=True)
class Sampling:
    """Sample any diffusers pipeline to a folder of images.

    A folder with some of the requested images is completed. A folder of another request is refused unless `overwrite`.
    Under `accelerate launch` or torchrun, the processes share the images.
    """

    model: str  # folder or Hub name of a pipeline, or a LoRA's .safetensors file for `base`
    out: Path  # folder of the images and their manifest.json
    # number of images; by default the protocol's, else one per prompt, else 2000. torchrun reserves --n: use
    # --num_images
    n: Annotated[int | None, tyro.conf.arg(aliases=["--num_images"])] = None
    steps: int | None = None  # by default an exported student's, else the pipeline's own default (EDM teacher: 18)
    # pipeline: the pipeline's own sampler; heun (2 steps - 1 calls), ddim (steps calls): ours on the teacher's ODE;
    # cfg++: its lambda is `guidance` in [0, 1], also for students with an Euler scheduler. By default heun for EDM
    # teachers, else pipeline
    solver: Solver | None = None
    # the pipeline's guidance_scale (true_cfg_scale); by default its own, but none for exported students and our solvers
    guidance: float | None = None
    seed: int = 0  # of the noise; image i depends on (seed, i) and on its prompt or label
    name: str | None = None  # name of the model in tables; by default its folder's
    overwrite: bool = False  # replace the images of another request
    # kind of model in tables; by default teacher if one of our solvers samples it
    kind: Literal["teacher", "pipeline", "lora"] | None = None
    protocol: str | None = None  # defines prompts or labels, number and size (python -m eval.protocols)
    prompts: str | None = None  # .txt (one per line), .jsonl, .parquet, a dataset, or a folder of .txt files
    prompt_column: str | None = None  # column of the prompts; by default text, caption or prompt
    per_prompt: int = 1  # images per prompt: image i has prompt i // per_prompt
    classes: int | None = None  # label of image i is i % classes, for pipelines that take labels
    base: str | None = None  # base of a LoRA file: folder or Hub name
    # a diffusers class, or a folder with one; by default the pipeline's own, or the one beside a LoRA file
    scheduler: str | None = None
    scheduler_config: str | None = None  # changes to its config, as JSON: '{"timestep_spacing": "trailing"}'
    resolution: int | None = None  # pixels per side; by default the training resolution
    frame: int | None = None  # index of the video frame to keep
    revision: str | None = None  # revision on the Hub
    variant: str | None = None  # weight files, for example fp16
    # a pipeline that replaces the first `skip` calls of `model`: a student's teacher, for diversity, or a smaller model
    # (T-Stitch)
    first: str | None = None
    first_steps: int = 20  # steps of a full image; it runs those above the noise level of the model's next call
    first_guidance: float = 1.0  # of `first`; under cfg++ its lambda
    first_solver: Literal["heun", "ddim", "cfg++"] = "ddim"  # of `first`
    skip: int = 1  # number of the model's calls that `first` replaces; not all
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the networks
    device: str | None = None  # cpu, cuda, cuda:1 ...; by default cuda if available
    # rows per network call: by default 1, for pixel models 50. More are faster, but change the images by rounding
    rows: int | None = None
    batch: int | None = None  # images per batch; by default `rows`, best a multiple of it
    skip_tuning: float | None = (
        None  # factor of a UNet's deepest skip, for example 0.8 (pipelines/inference/skip_tuning.py)
    )
    # perturbed-attention guidance (pipelines/inference/pag.py), only with our solvers; 0: none
    pag_scale: float = 0.0
    pag_layers: tuple[str, ...] = ("mid_block",)  # modules whose self-attention is perturbed
    # file for latency, throughput and peak memory (eval/sampling/cost.py), measured after the images
    cost: Path | None = None

    def __post_init__(self) -> None:
        self._validate_numbers()
        self._validate_unread_flags()
        if self.protocol is not None and (self.prompts or self.classes or self.per_prompt > 1):
            raise ValueError(
                f"protocol {self.protocol} has its own prompts or labels: leave out flags that give others"
            )
        try:
            kind = torch.device(self.device or "cpu").type
        except RuntimeError:
            raise ValueError(f"device is {self.device!r}; it must be cpu, cuda, cuda:1 or another of torch's") from None
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {self.device}, but torch sees no GPU; use cpu")

    def _validate_numbers(self) -> None:
        for key, most in MOST.items():
            value = getattr(self, key)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{key} is {value}; it must be at least 1 and at most {most:,}")
        for key in ("guidance", "first_guidance"):
            value = getattr(self, key)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{key} is {value}; it must be finite")
        if not 0 <= self.pag_scale < float("inf"):
            raise ValueError(f"pag_scale is {self.pag_scale}; it must be at least 0 and finite")
        if self.skip_tuning is not None and not 0 <= self.skip_tuning < float("inf"):
            raise ValueError(f"skip_tuning is {self.skip_tuning}; it must be at least 0 and finite: 1 changes nothing")
        for key in ("skip", "seed"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 0")

    def _validate_unread_flags(self) -> None:
        """ValueError for a flag that is given without the flag that makes it count."""
        unread = dict.fromkeys(FIRST[1:], "first") if self.first is None else {}
        if not self.pag_scale:
            unread["pag_layers"] = "pag_scale"
        for key, other in unread.items():
            if (value := getattr(self, key)) != type(self).__dataclass_fields__[key].default:
                raise ValueError(f"{key} is {value}, which nothing reads without --{other}: pass that, or leave it out")

    @cached_property
    def plan(self) -> Protocol | None:
        return None if self.protocol is None else find_protocol(self.protocol)

    @cached_property
    def lora(self) -> Path | None:
        """The file of the LoRA; None if the model is a folder."""
        if not self.model.endswith(".safetensors"):
            return None
        if not Path(self.model).is_file():
            raise ValueError(f"there is no LoRA file {self.model}")
        if self.base is None:
            raise ValueError(f"{self.model} is a LoRA: say by --base which pipeline it is put on")
        return Path(self.model)

    @cached_property
    def folder(self) -> Path:
        """The folder of the pipeline. A pipeline of the Hub is downloaded."""
        from pipelines.components import locate_pipeline

        if self.lora is None and self.base is not None:
            raise ValueError(f"base is {self.base}, but {self.model} is no LoRA's .safetensors file; leave out --base")
        return locate_pipeline(self.base if self.lora else self.model, self.revision, self.variant)

    @cached_property
    def first_folder(self) -> Path | None:
        """The folder of `first`."""
        from pipelines.components import locate_pipeline

        return None if self.first is None else locate_pipeline(self.first, None, self.variant)

    @cached_property
    def exported_facts(self) -> Tree:
        return read_distill_json(self.folder) if self.lora is None else {}

    @property
    def student(self) -> bool:
        return bool(self.exported_facts.get("student"))

    @cached_property
    def pipeline_class(self) -> str:
        from pipelines.components import read_index

        return str(read_index(self.folder)["_class_name"])

    @property
    def method(self) -> Solver:
        """The given solver, or the default one."""
        teacher = self.exported_facts and not self.student and self.pipeline_class == EDM
        return self.solver or ("heun" if teacher else "pipeline")

    @property
    def calls(self) -> int | None:
        """The number of steps; None for the pipeline's default."""
        return self.steps or self.exported_facts.get("steps") or (18 if self.method != "pipeline" else None)

    @property
    def rows_per_call(self) -> int:
        """The number of rows in a call of the network."""
        return self.rows or (50 if self.pipeline_class == EDM else 1)

    @property
    def scheduling(self) -> tuple[str | None, Tree]:
        """(scheduler, changes to its config)."""
        try:
            changed = json.loads(self.scheduler_config or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"scheduler_config is {shorten(self.scheduler_config)}, not JSON: {error}") from None
        if not isinstance(changed, dict):
            raise ValueError(f"scheduler_config is {shorten(self.scheduler_config)}; it must be a JSON object")
        beside = self.lora is not None and (self.lora.parent / "scheduler" / "scheduler_config.json").is_file()
        return self.scheduler or (f"{self.lora.parent}" if beside else None), changed

    @cached_property
    def conditions(self) -> SampleConditions:
        """The prompt or label of every image."""
        if self.plan is not None:
            return protocol_conditions(self.folder, self.plan, self.n)
        if self.prompts is not None:
            return prompt_conditions(self.folder, self.prompts, self.prompt_column, self.n, self.per_prompt)
        return label_conditions(self.folder, self.classes, self.n or 2000)

    def validate(self) -> None:
        """ValueError for flags that contradict each other or the model, before anything heavy is imported."""
        check_output(self.out, "out", folder=True)
        if self.cost is not None:
            check_output(self.cost, "cost")
        if self.method != "pipeline" and (self.has_own_sampler or self.lora or any(self.scheduling)):
            raise ValueError(f"solver is {self.solver}: it is for teachers, without LoRA and scheduler; use pipeline")
        if self.first is not None:
            self._validate_first()
        self._validate_guidance()
        self._validate_pag()
        most = self.exported_facts.get("steps")
        if self.student and self.steps and most and self.steps > most:
            raise ValueError(f"steps is {self.steps}, but {self.model} was made for {most}; use 1 to {most}")
        if self.rows_per_call > 1 and self.pads_to_longest:
            raise ValueError(
                f"rows is {self.rows}, but {self.pipeline_class} pads prompts to the longest of a call; use 1"
            )

    @property
    def has_own_sampler(self) -> bool:
        """Whether the model is a student that its pipeline samples."""
        return self.student and self.method != "cfg++"

    def _validate_first(self) -> None:
        if self.calls is None:
            raise ValueError(f"{self.model} goes on after {self.first}: say by --steps of how many calls it is")
        if self.skip >= self.calls:
            raise ValueError(
                f"skip is {self.skip}, and {self.model} makes {self.calls} call(s), of which at least one must be left"
                f": use 0 to {self.calls - 1}; with 0, {self.first} makes what it would above the level of the first"
            )
        if self.first_folder is not None and read_distill_json(self.first_folder).get("student"):
            raise ValueError(f"first is {self.first}, a student; a solver follows a teacher's ODE: give a teacher")

    def _validate_pag(self) -> None:
        if self.pag_scale and (self.method == "pipeline" or self.student or self.first is not None):
            raise ValueError(
                f"pag_scale is {self.pag_scale}, which a solver of ours adds to a teacher that samples alone: pass "
                "--solver ddim. Pipelines with it are diffusers' own (enable_pag=True)"
            )

    def _validate_guidance(self) -> None:
        for key, solver in (("guidance", self.method), ("first_guidance", self.first_solver)):
            if solver == "cfg++" and not 0 <= (scale := getattr(self, key) or 0) <= 1:
                raise ValueError(f"{key} is {scale}, which is lambda under cfg++: it must be in [0, 1]; 0.6, say")
        guided = self.method == "cfg++" or (self.method != "pipeline" and self.guidance not in (None, 1))
        if guided and self.pipeline_class == EDM and self.exported_facts.get("null_class") is None:
            raise ValueError(
                f"{self.model} has no label for none (null_class in distill.json), which guidance and cfg++ need: "
                "leave them out; an exported student of labels has none"
            )
        if self.has_own_sampler and self.guidance not in (None, 0, 1):
            raise ValueError(
                f"guidance is {self.guidance}, but {self.model} is a student, which has its guidance built in; use 1"
            )

    @property
    def pads_to_longest(self) -> bool:
        """Whether the pipeline pads prompts to the longest of a call, so that rows depend on their neighbours."""
        from pipelines.families.registry import known_pipelines

        family = known_pipelines().get(self.pipeline_class)
        return family is not None and family.pads_to_longest

    def request(self) -> Manifest:
        """All that the images depend on."""
        here = self.lora or (self.folder if self.folder == Path(self.model) else None)
        scheduler, changed = self.scheduling
        before = model_name(self.first_folder) if self.first and self.first_folder == Path(self.first) else self.first
        optional: Manifest = {}
        if self.first_folder:
            optional |= {key: getattr(self, key) for key in FIRST} | {"first": before}
        if self.skip_tuning is not None:
            optional["skip_tuning"] = self.skip_tuning
        if self.pag_scale:
            optional |= {"pag_scale": self.pag_scale, "pag_layers": list(self.pag_layers)}
        return {
            "model": self.name or (model_name(here) if here else self.model),
            "model_hash": model_hash(self.folder, *filter(None, (self.lora, self.first_folder))),
            "n": len(self.conditions.values),
            "prompts": self.conditions.hash,
            "protocol_hash": self.plan and self.plan.hash,
            "steps": self.calls,
            "solver": self.method,
            "scheduler": scheduler,
            "scheduler_config": changed,
            "rows": self.rows_per_call,
            **{key: getattr(self, key) for key in ("guidance", "seed", "resolution", "frame", "dtype")},
            **optional,
        }

    def sampler(self, device: torch.device) -> Sampler:
        """Load the model. Its facts hold the steps and the guidance of its sampler."""
        precision = getattr(torch, self.dtype)
        turns = self.first_folder is not None or (self.student and self.method == "cfg++")
        if self.method == "pipeline" or turns:
            replaced = self.plan.components if self.plan else ()
            pipe = load_pipeline(self.folder, self.lora, *self.scheduling, self.variant, precision, replaced).to(device)
            self.apply_skip_tuning(getattr(pipe, "unet", pipe))
            if turns:
                return self.build_staged_sampler(pipe)
            family, shape = family_of(pipe, self.resolution)
            return pipeline_sampler(pipe, self.calls, self.guidance, family, shape, own=not self.student)
        from pipelines import load as teacher_of

        teacher = teacher_of(self.folder, self.resolution, None, self.variant, precision)
        teacher.parts.device = device
        teacher.denoiser.net.to(device, precision)
        if self.guidance not in (None, 1) and self.pipeline_class != EDM:
            teacher.null()  # the empty prompt's; an EDM teacher says which label is none
        self.apply_skip_tuning(teacher.denoiser.net)
        if self.pag_scale:
            from pipelines.inference.pag import with_pag

            teacher.denoiser = with_pag(teacher.denoiser, self.pag_scale, self.pag_layers)
        return teacher_sampler(teacher, self.calls, self.method, 1.0 if self.guidance is None else self.guidance)

    def build_staged_sampler(self, pipe: DiffusionPipeline) -> Sampler:
        """The sampler of `first` and then the loaded model, or of a student under CFG++."""
        from pipelines.inference.stitch import SamplingStage, teacher_from_pipeline

        solver = None if self.method == "pipeline" else self.method
        guidance = self.guidance or 1.0
        then = SamplingStage(
            teacher_from_pipeline(pipe, self.resolution),
            self.calls or 1,
            guidance,
            self.skip if self.first else 0,
            solver,
        )
        facts = {"steps": self.calls, "guidance": guidance, "scheduler": solver or type(pipe.scheduler).__name__}
        if self.first_folder is None:
            return staged_sampler([then], facts)
        other = load_pipeline(self.first_folder, None, None, {}, self.variant, pipe.dtype).to(pipe.device)
        first = SamplingStage(
            teacher_from_pipeline(other, self.resolution), self.first_steps, self.first_guidance, 0, self.first_solver
        )
        return staged_sampler([first, then], facts)

    def apply_skip_tuning(self, net: nn.Module) -> None:
        """Scale the skips of a network and of its experts, if `skip_tuning` is given."""
        from pipelines.inference.skip_tuning import install_factors, skip_factors

        if self.skip_tuning is not None:
            for one in (net, *getattr(net, "experts", ())):
                install_factors(one, skip_factors(one, self.skip_tuning))

    def run(self) -> Manifest:
        """Generate the missing images and return the manifest. ValueError if another command writes to the folder."""
        self.validate()
        with folder_lock(self.out, "--out", beside=True):
            return self.generate_missing()

    def generate_missing(self) -> Manifest:
        """The manifest of a folder that no other process writes."""
        conditions = self.conditions
        ranks = ProcessGroup()
        if ranks.index == 0:
            prepare_output_folder(self.out, self.request(), conditions, self.overwrite)
        ranks.wait()
        manifest = folders.read_manifest(self.out, unfinished=True)
        if manifest["complete"] and self.cost is None:
            return manifest
        from pipelines.launch import silence_libraries

        silence_libraries()
        device = ranks.device(self.device)
        try:
            sampler = self.sampler(device)
            share = None if manifest["complete"] else generate_missing_images(self, sampler, ranks)
        except Exception:
            if ranks.index == 0:
                remove_empty_output(self.out)
            raise
        if share is not None:
            shares = ranks.gather(share)
            if ranks.index == 0:
                _finish(self.out, manifest, self.facts(sampler, shares, device), shares)
        if ranks.index == 0 and self.cost is not None:
            self.measure(sampler, device)
        ranks.wait()
        return folders.read_manifest(self.out)

    def facts(self, sampler: Sampler, shares: list[RankResult], device: torch.device) -> Manifest:
        """What the manifest holds beside the request."""
        seconds = max(share.seconds for share in shares)
        kind = "pipeline" if self.method == "pipeline" else "teacher"
        return {
            "kind": self.kind or ("lora" if self.lora else kind),
            "student": self.student or self.lora is not None,
            **sampler.facts,
            "nfe": as_int_if_integral(max(share.nfe for share in shares)),
            "protocol": self.protocol,
            "commit": git_commit(),
            "hardware": hardware(device),
            "processes": len(shares),
            "seconds": round(seconds, 3),
            "images_per_second": round(sum(share.image_count for share in shares) / max(seconds, 1e-9), 3),
        }

    def measure(self, sampler: Sampler, device: torch.device) -> None:
        """Measure the cost of an image and write it to the file `cost`."""
        conditions = self.conditions.values

        def make(k: int) -> Tensor:
            return sampler.make(
                [image_generator(self.seed, i) for i in range(k)], [conditions[i % len(conditions)] for i in range(k)]
            )

        with torch.no_grad():
            measured = measure_cost(make, self.batch or self.rows_per_call, device=device)
        facts = {"nfe": as_int_if_integral(sampler.nfe()), "parameters": sampler.facts["parameters"]}
        write_json(self.cost, measured | facts)


def generate(
    model: str | Path, out: str | Path, n: int | None = None, steps: int | None = None, **others: Any
) -> Manifest:
    """`Sampling(...).run()`: the manifest of a folder of images."""
    return Sampling(str(model), Path(out), n, steps, **others).run()


class ProcessGroup:
    """The processes of `accelerate launch` or torchrun, or this one alone."""

    def __init__(self) -> None:
        from pipelines.launch import start_accelerator, warn_single_process

        self.accelerator = None
        self.index = 0
        self.count = 1
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            warn_single_process()
        else:
            self.accelerator = start_accelerator(days=7)  # for one that has more left to make
            self.index = self.accelerator.process_index
            self.count = self.accelerator.num_processes

    def device(self, name: str | None) -> torch.device:
        if name is not None or self.accelerator is None:
            return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        return self.accelerator.device

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def gather(self, value: RankResult) -> list[RankResult]:
        """The values of all processes."""
        if self.accelerator is None:
            return [value]
        values: list[RankResult] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


@dataclass
class RankResult:
    """The images of one process."""

    digests: dict[int, str]  # of images that are there, by their numbers
    image_count: int = 0
    seconds: float = 0.0  # of sampling
    nfe: float = 0.0


def generate_missing_images(work: Sampling, sampler: Sampler, ranks: ProcessGroup) -> RankResult:
    """Generate this rank's missing images and hash its existing ones."""
    from distill.progress import bar

    conditions = work.conditions.values
    existing = {file.name for file in work.out.glob("*.png")}
    done = [i for i in range(len(conditions)) if folders.file_name(i) in existing]
    missing = sorted(set(range(len(conditions))) - set(done))
    ranks.wait()  # all have looked before anyone writes: the parts are disjoint
    part = slice(ranks.index, None, ranks.count)
    read = lambda i: folders.read_levels(work.out / folders.file_name(i))
    result = RankResult({i: folders.image_digest(read(i)) for i in done[part]})
    mine = missing[part]
    batch = work.batch or work.rows_per_call
    with bar(len(mine), "image", work.out.name, ranks.index == 0) as progress, torch.no_grad():
        if not missing and ranks.index == 0:  # killed before its manifest was written: a call counts its evaluations
            rows = work.rows_per_call
            sampler.make([image_generator(work.seed, 0)] * rows, list(conditions[:1]) * rows)
        for unit in (mine[k : k + batch] for k in range(0, len(mine), batch)):
            start = time.perf_counter()
            levels = _sample_images(work, sampler, unit)
            result.seconds += time.perf_counter() - start
            for i, image in zip(unit, levels, strict=True):
                folders.save_image(work.out, i, image)
                result.digests[i] = folders.image_digest(image)
            progress.update(len(unit))
    result.image_count = len(mine)
    result.nfe = sampler.nfe()
    return result


def _sample_images(work: Sampling, sampler: Sampler, numbers: list[int]) -> list[Tensor]:
    """The images of these numbers, uint8 [C, H, W] each. A call with fewer images repeats the last one."""
    conditions = work.conditions.values
    rows = work.rows_per_call
    size = work.plan.size if work.plan else None
    levels: list[Tensor] = []
    for pick in (numbers[k : k + rows] for k in range(0, len(numbers), rows)):
        padded = pick + [pick[-1]] * (rows - len(pick))
        images = sampler.make([image_generator(work.seed, i) for i in padded], [conditions[i] for i in padded])
        levels += _levels(images[: len(pick)], pick, size, work.frame)
    return levels


def _levels(images: Tensor, numbers: list[int], size: int | None, frame: int | None) -> list[Tensor]:
    """Images in [-1, 1] as uint8 [C, H, W] each; of a video, frame `frame`. ValueError for NaN and for another size."""
    if images.ndim == 5:
        if frame is None or not 0 <= frame < images.shape[2]:
            raise ValueError(
                f"this pipeline makes videos of {images.shape[2]} pictures, and frame is {frame}: "
                f"choose the one to keep, --frame 0 to {images.shape[2] - 1}"
            )
        images = images[:, :, frame]
    if size is not None and images.shape[-2:] != (size, size):
        pixels = " x ".join(map(str, images.shape[:-3:-1]))
        raise ValueError(f"the protocol is of {size} x {size} pixels, and these images are {pixels}: try --resolution")
    finite = torch.isfinite(images.flatten(1)).all(1)
    if not finite.all():
        bad = numbers[int((~finite).nonzero()[0])]
        raise ValueError(f"image {bad} holds NaN or infinite values; it was not written. Try another --dtype")
    return list(folders.quantize(images.cpu()))


def prepare_output_folder(out: Path, request: Manifest, conditions: SampleConditions, overwrite: bool) -> None:
    """Write the manifest and the prompts of a request to `out`. A folder of this request keeps its images."""
    old = folders.read_manifest(out, unfinished=True) if out.is_dir() else {}
    if old.get("request") is not None and {**old["request"], "model": request["model"]} == request:
        for leftover in out.glob(".*.partial"):
            leftover.unlink()
        if old.get("model") != request["model"]:  # the same images under another name
            folders.write_manifest(out, {**old, "model": request["model"], "request": request})
        return
    if old.get("request") is not None and not overwrite:
        was = old["request"]
        asks = {**dict.fromkeys(old["request"]), **request}
        differ = [f"{k} {was.get(k)!r}, not {v!r}" for k, v in asks.items() if was.get(k) != v]
        raise ValueError(
            f"{out} is not empty: it holds images of another run ({'; '.join(differ)}); choose another folder, or "
            "pass --overwrite"
        )
    folders.check_free(out, overwrite)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        if conditions.prompts:
            lines = ({"file_name": folders.file_name(i), "text": text} for i, text in enumerate(conditions.values))
            (out / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        labels = None if conditions.prompts else conditions.values
        folders.write_manifest(out, {"complete": False, **request, "labels": labels, "request": request})
    except OSError:
        remove_empty_output(out)
        raise


def remove_empty_output(out: Path) -> None:
    """Delete the manifest and the prompts if no image was written, so a failed request leaves no folder behind."""
    if not any(out.glob("*.png")):
        for name in (folders.MANIFEST, "metadata.jsonl"):
            (out / name).unlink(missing_ok=True)
        with suppress(OSError):  # something else lies in it
            out.rmdir()


def _finish(out: Path, manifest: Manifest, facts: Manifest, shares: list[RankResult]) -> None:
    """Write the manifest of the complete folder. ValueError if other images lie in it."""
    digests = {i: digest for share in shares for i, digest in share.digests.items()}
    assert len(digests) == sum(len(share.digests) for share in shares) == manifest["n"], "an image is missing, or twice"
    names = sorted(file.name for file in out.glob("*.png"))
    if names != [folders.file_name(i) for i in range(manifest["n"])]:
        raise ValueError(f"{out} holds images that are not of this run; remove them, or choose another folder")
    shape = list(folders.read_levels(out / names[0]).shape)
    image_facts = {
        "shape": shape,
        "size": shape[-1],
        "hash": folders.combine_digests(digests[i] for i in range(manifest["n"])),
    }
    folders.write_manifest(out, {**manifest, **facts, **image_facts, "complete": True})


def read_distill_json(model: Path) -> Tree:
    """The distill.json of an exported folder; {} for others. ValueError where there is no model."""
    if not model.is_dir():
        raise ValueError(f"there is no model folder {model}; train or export one first")
    path = model / "distill.json"
    facts = read_json(path, "export the model again") if path.exists() else {}
    if not isinstance(facts, dict) or not (facts.get("steps") is None or folders.is_count(facts["steps"])):
        raise ValueError(f"{path} is not a JSON object, or has no number of steps; export the model again")
    return facts


def model_name(model: Path) -> str:
    """The name of a folder or a file in tables: the name of its run, if its own name is that of every export.

    runs/dmd2/pipeline is dmd2, runs/dmd2/watch/checkpoint-500/pipeline is dmd2-checkpoint-500.
    """
    parts = list(Path(os.path.normpath(model.absolute())).parts)
    if model.suffix == ".safetensors":
        parts[-1] = model.stem
    while len(parts) > 2 and parts[-1] in EXPORTS:
        parts.pop()
    name = parts.pop()
    if re.fullmatch(r"checkpoint-\d+", name):
        while len(parts) > 2 and parts[-1] in EXPORTS:
            parts.pop()
        return f"{parts[-1]}-{name}" if len(parts) > 1 else name
    return name


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


def as_int_if_integral(value: float) -> int | float:
    return int(value) if value == int(value) else round(value, 3)


def main() -> None:
    """Command line of `Sampling`."""
    from eval.cli import run

    def stage(sampling: Sampling) -> Manifest:
        return sampling.run()

    stage.__doc__ = Sampling.__doc__
    manifest = run(stage)
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{manifest['n']} images of {manifest['model']}, {manifest['nfe']} network evaluation(s) each, "
            f"{manifest['images_per_second']} images/s"
        )
