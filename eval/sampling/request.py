"""`Sampling`: what eval.generate is asked for. It checks its flags, and loads the sampler that they describe."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from torch import nn

from eval.files import check_output, shorten
from eval.images.manifest import Manifest
from eval.protocol import Protocol
from eval.protocols import find_protocol
from eval.sampling.conditions import (
    IMAGES,
    PIXELS,
    WITHOUT_CONDITION,
    SampleConditions,
    label_conditions,
    prompt_conditions,
    protocol_conditions,
)
from eval.sampling.models import Tree, model_hash, model_name, read_distill_json
from eval.sampling.sampler import (
    Sampler,
    family_of,
    load_pipeline,
    pipeline_sampler,
    staged_sampler,
    teacher_sampler,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Solver = Literal["pipeline", "heun", "ddim", "cfg++"]
FIRST = ("first", "first_steps", "first_guidance", "first_solver", "skip")
MOST = {"n": IMAGES, "steps": 10_000, "per_prompt": IMAGES, "classes": IMAGES, "rows": 10_000, "batch": 10_000,
        "first_steps": 10_000, "resolution": 1 << 14}  # fmt: skip
EDM = "ConsistencyModelPipeline"


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
    # defines prompts or labels, number and size: a name (python -m eval.protocols) or a .yaml file. By default the
    # model's own size, and its labels or `prompts`
    protocol: str | None = None
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
        return locate_pipeline(self.base or self.model, self.revision, self.variant)

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
        return self.solver or ("heun" if teacher or self.pipeline_class in WITHOUT_CONDITION else "pipeline")

    @property
    def calls(self) -> int | None:
        """The number of steps; None for the pipeline's default."""
        return self.steps or self.exported_facts.get("steps") or (18 if self.method != "pipeline" else None)

    @property
    def rows_per_call(self) -> int:
        """The number of rows in a call of the network."""
        return self.rows or (50 if self.pipeline_class in PIXELS else 1)

    @property
    def scheduling(self) -> tuple[str | None, Tree]:
        """(scheduler, changes to its config)."""
        try:
            changed = json.loads(self.scheduler_config or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"scheduler_config is {shorten(self.scheduler_config)}, not JSON: {error}") from None
        if not isinstance(changed, dict):
            raise ValueError(f"scheduler_config is {shorten(self.scheduler_config)}; it must be a JSON object")
        if not self.scheduler and self.lora is not None:
            beside = self.lora.parent
            if (beside / "scheduler" / "scheduler_config.json").is_file():
                return f"{beside}", changed
        return self.scheduler or None, changed

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
        if guided and self.pipeline_class in PIXELS and self.exported_facts.get("null_class") is None:
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

        return any(family.pads_to_longest for family in known_pipelines().get(self.pipeline_class, ()))

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
            "protocol_hash": self.plan and self.plan.sampling_hash,
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
        steps = self.calls
        assert steps is not None, "our solvers have a default"
        teacher.parts.device = device
        teacher.denoiser.net.to(device, precision)
        if self.guidance not in (None, 1) and self.pipeline_class not in PIXELS:
            teacher.null()  # the empty prompt's; a teacher of pixels says which label is none
        self.apply_skip_tuning(teacher.denoiser.net)
        if self.pag_scale:
            from pipelines.inference.pag import with_pag

            teacher.denoiser = with_pag(teacher.denoiser, self.pag_scale, self.pag_layers)
        return teacher_sampler(teacher, steps, self.method, 1.0 if self.guidance is None else self.guidance)

    def build_staged_sampler(self, pipe: DiffusionPipeline) -> Sampler:
        """The sampler of `first` and then the loaded model, or of a student under CFG++."""
        from pipelines.inference.stitch import SamplingStage, teacher_from_pipeline

        guidance = self.guidance or 1.0
        skip = self.skip if self.first else 0
        then = SamplingStage(teacher_from_pipeline(pipe, self.resolution), self.calls or 1, guidance, skip)
        if self.method != "pipeline":
            then = replace(then, solver=self.method)
        facts = {"steps": self.calls, "guidance": guidance, "scheduler": then.solver or type(pipe.scheduler).__name__}
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
