"""From a diffusers pipeline to a teacher, and from a student back to a pipeline."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from pipelines import fields

FAMILIES = {  # _class_name of model_index.json -> module of this package
    "ConsistencyModelPipeline": "edm",
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
    "SanaSprintPipeline": "sana",
    "QwenImagePipeline": "qwen",
    "WanPipeline": "wan",
}


NEEDED = ("unet", "transformer", "vae", "scheduler")  # components that may not be null where they are named
LIBRARIES = ("diffusers", "transformers", "pipelines.edm_nets")  # whose classes components may be


class ExportError(Exception):
    """An exported pipeline does not sample what the student samples."""


class Parts:
    """The components of a local pipeline folder, each loaded when it is first used.

    A run whose prompts and images are cached never holds a text encoder, nor a VAE where it draws no samples.
    variant: of the weight files ("fp16"). dtype: of the network; that of text encoders and VAE is `precision`.
    told: its guidance is told to the network, which gets an embedding for it where it has none.
    """

    told = False

    def __init__(
        self, folder: str | Path, variant: str | None = None, dtype: torch.dtype = torch.float32, told: bool = False
    ) -> None:
        self.folder, self.variant, self.dtype = Path(folder), variant, dtype
        self.index = index(folder)
        if variant and not any(has_variant(part, variant) for part in self.folder.iterdir()):
            raise ValueError(f"no component of {folder} has weights of the variant {variant!r}: leave --variant out")
        if told:
            self.tell()
        self.precision = torch.float32
        self.device = torch.device("cpu")  # where encoders and VAE work; the network is moved by the trainer
        self.given: dict[str, Any] = {}  # components that are not read from the folder
        self.asked: dict[str, int] = {}  # a size that is not the teacher's own: "resolution", "frames"

    def tell(self) -> None:
        """Have the network be told its guidance: a ValueError, as soon as it is read, where it can't be."""
        self.told, self.index = True, self.index | getattr(self.family, "TOLD", {})

    def hearing(self, net: Any) -> Any:
        """The network that hears its guidance, as FLUX.1-dev's and an LCM's do, or the family's makes itself do."""
        if hasattr(self.family, "hearing"):
            return self.family.hearing(net)
        if not (net.config.get("guidance_embeds") or net.config.get("time_cond_proj_dim")):
            raise ValueError(
                f"a range of guidance needs a guidance embedding, but the network of {self.folder} has none: "
                "give --method.guidance one number"
            )
        return net

    @property
    def family(self) -> ModuleType:
        name = self.index["_class_name"]
        if name not in FAMILIES:
            raise ValueError(f"{self.folder} is a {name}; supported pipelines are {sorted(FAMILIES)}")
        return importlib.import_module(f"pipelines.{FAMILIES[name]}")

    @property
    def network(self) -> str:
        """The component that denoises: "unet" or "transformer"."""
        return "unet" if "unet" in self.index else "transformer"

    def component(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """One component of the folder, in evaluation mode, without gradients."""
        if name in self.given:
            return self.given[name]
        if not isinstance(self.index.get(name), list):
            raise ValueError(f"{self.folder}: its model_index.json names no {name}")
        library, kind = self.index[name]
        if library is None:
            raise ValueError(f"{self.folder}: its model_index.json has no {name} (null), which is needed here")
        self.check(name)
        cls = getattr(importlib.import_module(library), kind, None) if library in LIBRARIES else None
        try:
            loads, weights = (hasattr(cls, method) for method in ("from_pretrained", "parameters"))
        except ImportError as error:  # of a class whose own library is not installed
            raise ValueError(f"{self.folder}: its {name} is a {kind}: {' '.join(str(error).split())}") from None
        if not loads:
            raise ValueError(f"{self.folder}: its {name} is a {kind} of {library}, which has no such class")
        variant = self.variant if has_variant(self.folder / name, self.variant) else None
        options = {"variant": variant, "use_safetensors": True, "dtype": dtype or self.precision}
        options = options if weights else {}  # a scheduler or a tokenizer has no weights
        try:
            found = cls.from_pretrained(self.folder, subfolder=name, local_files_only=True, **options)
        except Exception as error:  # classes raise all kinds of errors for a bad config
            raise ValueError(f"{self.folder}: its {name} ({kind}) cannot be read: {error}") from error
        found = self.hearing(found) if self.told and name == self.network else found
        return found.requires_grad_(False).eval() if options else found

    def config(self, name: str) -> dict[str, Any]:
        """The config of a component that is not loaded."""
        return fields.read(self.folder / name / "config.json")

    def check(self, name: str) -> None:
        """ValueError for a component whose class cannot use its config, or whose weights are pickles only."""
        suffixes = {file.suffix for file in (self.folder / name).glob("*")}
        if ".bin" in suffixes and ".safetensors" not in suffixes:
            raise ValueError(
                f"{self.folder / name} has its weights in .bin files only, which may run code when they are read: "
                "where you trust them, load the pipeline with diffusers and save it with save_pretrained"
            )
        for file in ("config.json", "scheduler_config.json"):
            if (self.folder / name / file).exists():
                fields.read(self.folder / name / file)

    @cached_property
    def net(self) -> Any:
        return self.component(self.network, self.dtype)

    @cached_property
    def vae(self) -> Any:
        return self.component("vae").to(self.device)

    @cached_property
    def text(self) -> Any:
        """The pipeline with its text encoders and tokenizers only: for encode_prompt."""
        for name, entry in self.index.items():  # SD3's third encoder may be null
            if name.startswith(("text_encoder", "tokenizer")) and entry[:1] == [None] and not name.endswith("_3"):
                raise ValueError(
                    f"{self.folder}: its model_index.json has no {name} (null), which encodes prompts: name one"
                )
        return self.pipeline({self.network: None, "vae": None}).to(self.device)

    def drop_text(self) -> None:
        """Free the text encoders."""
        self.__dict__.pop("text", None)

    def scheduler(self) -> Any:
        """The pipeline's own scheduler, a new object."""
        return self.component("scheduler")

    def pipe(self, **given: Any) -> Any:
        """The whole pipeline around the teacher's network; `given` replaces components."""
        return self.pipeline({self.network: self.net, "vae": self.vae} | given)

    def pipeline(self, given: dict[str, Any]) -> Any:
        """The pipeline of the folder; `given` replaces components, by None where one is not to be loaded."""
        import diffusers

        cls = getattr(diffusers, self.index["_class_name"])
        absent = [name for name, entry in self.index.items() if isinstance(entry, list) and entry[0] is None]
        absent += [name for name in ("safety_checker",) if name in self.index]
        given = dict.fromkeys(absent) | given
        options = {"variant": self.variant, "dtype": self.precision, "local_files_only": True}
        for name in {name for name, entry in self.index.items() if isinstance(entry, list)} - given.keys():
            self.check(name)
        try:
            pipe = cls.from_pretrained(self.folder, use_safetensors=True, **options, **self.given | given)
        except Exception as error:  # of any kind, as above
            raise ValueError(f"{self.folder}: its {cls.__name__} cannot be read: {error}") from error
        pipe.set_progress_bar_config(disable=True)
        return pipe


@dataclass(eq=False)
class Teacher:
    """A diffusers pipeline as a denoiser.

    encode   prompts (or class labels), a list of B -> c with B rows; loads the text encoders at its first call.
    decode   x [B, *shape] -> images [B, C, H, W], videos [B, C, T, H, W], in [-1, 1].
    latent   images in [-1, 1] and eps [B, *shape] -> x, a sample of the VAE's posterior; pixel models: the images.
    shape    of one sample, (C, H, W), video (C, T, H, W).
    parts    the folder it comes from; parts.family is its module.
    negative encode, as the pipeline does it for negative prompts; None: the same.
    """

    denoiser: Denoiser
    encode: Callable[[Sequence[Any]], Condition]
    decode: Callable[[Tensor], Tensor]
    latent: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    parts: Parts
    negative: Callable[[Sequence[Any]], Condition] = None

    def __post_init__(self) -> None:
        self.encode = torch.no_grad()(self.encode)
        self.negative = torch.no_grad()(self.negative or self.encode)

    def null(self) -> Condition:
        """The condition of "no prompt", kept in denoiser.null: that of the empty prompt where none is given yet."""
        if self.denoiser.null is None:
            self.denoiser.null = self.negative([""])
        return self.denoiser.null

    @torch.no_grad()
    def sample(self, z: Tensor, c: Condition, steps: int, guidance: float = 1.0, null: Condition = None) -> Tensor:
        """x [B, *shape] of the teacher under its own scheduler, from unit noise z; null: of a negative prompt."""
        from distill.guidance import Guided

        base = replace(self.denoiser, null=null or (self.null() if guidance != 1 else None))
        guided = getattr(self.parts.family, "Rescaled", Guided)(base, guidance)
        scheduler = self.parts.scheduler()
        self.set_timesteps(scheduler, steps)
        last = float(base.schedule.native(torch.ones(1, dtype=torch.float64)))
        x = z * getattr(scheduler, "init_noise_sigma", 1.0)
        for n in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, n) if hasattr(scheduler, "scale_model_input") else x
            t = (n.double() / last).expand(len(x)).to(x.device)
            x = scheduler.step(guided(scaled, t, c).out, n, x, return_dict=False)[0]
        return x

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """As the family's pipeline does it: some pass sigmas of their own or a shift that depends on the size."""
        special = getattr(self.parts.family, "set_timesteps", None)
        special(scheduler, steps, self) if special else scheduler.set_timesteps(steps)


def load(
    folder: str | Path,
    resolution: int | None = None,
    frames: int | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    told: bool = False,
) -> Teacher:
    """The teacher of a local diffusers pipeline folder; its family is found from model_index.json.

    resolution, frames: of its samples, in pixels and pictures; None: what the network was trained for. dtype: of the
    network. told: it is to be told its guidance (Parts).
    """
    parts = Parts(folder, variant, dtype, told)
    asked = {"resolution": resolution, "frames": frames}
    parts.asked = {key: value for key, value in asked.items() if value is not None}
    if frames is not None and getattr(parts.family, "TASK", "") != "text-to-video":
        raise ValueError(f"frames is {frames}, but {folder} is a {parts.index['_class_name']}, which makes no videos")
    teacher = parts.family.load(parts, resolution, frames)
    teacher.denoiser.blocks = parts.family.BLOCKS
    return teacher


def opened(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    resolution: int | None = None,
    frames: int | None = None,
    dtype: torch.dtype = torch.float32,
    told: bool = False,
) -> Teacher:
    """The teacher of a folder or of a name on the Hub, which is downloaded; its network in `dtype`, `told` or not."""
    return load(located(name, revision, variant), resolution, frames, variant, dtype, told)


def has_variant(component: Path, variant: str | None) -> bool:
    """Whether a component's folder has safetensors of a variant; if not, the plain ones are loaded."""
    if not variant or not component.is_dir():
        return False
    return any(f.suffix in (".safetensors", ".json") and is_variant(f, variant) for f in component.iterdir())


def is_variant(file: Path, variant: str) -> bool:
    """Whether a file name is that of a variant's weights, for example model.fp16-00001-of-00002.safetensors."""
    return ".safetensors" in file.name and re.search(rf"\.{re.escape(variant)}[.-]", file.name) is not None


def located(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a pipeline; one of a name on the Hub is downloaded."""
    folder = Path(name)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from diffusers import DiffusionPipeline

        try:
            folder = Path(DiffusionPipeline.download(name, revision=revision, variant=variant, use_safetensors=True))
        except (OSError, ValueError) as error:
            raise ValueError(f"no pipeline {name!r}, as a folder or on the Hub: {error}") from None
    named = [part for part, entry in index(folder).items() if isinstance(entry, list) and entry[0] is not None]
    if missing := [part for part in named if not (folder / part).is_dir()]:
        raise ValueError(
            f"{folder} is not a complete pipeline: model_index.json names {', '.join(missing)}, and there is no such "
            "folder: download or copy all of it"
        )
    return folder


def index(folder: str | Path) -> dict[str, Any]:
    """model_index.json of a pipeline folder, or a ValueError that says what is missing."""
    path = Path(folder) / "model_index.json"
    if not str(folder):
        raise ValueError(
            "no teacher given: pass --pretrained_model_name_or_path, a diffusers pipeline's folder or Hub name"
        )
    if not path.is_file():
        seen = "" if path.is_absolute() else f" (seen from {Path.cwd()})"
        raise ValueError(f"no pipeline at {str(folder)!r}: a diffusers folder has a model_index.json{seen}")
    found = fields.read(path)
    if not isinstance(found.get("_class_name"), str):
        raise ValueError(f"{path} is damaged: it has no _class_name of a pipeline")
    for part, entry in found.items():
        if part in NEEDED and entry in (None, [None, None]):
            raise ValueError(f"{path}: its {part} is null, and a teacher needs one: name the library and class of one")
        if isinstance(entry, list) and entry != [None, None]:
            _known(path, part, entry)
    return found


def _known(path: Path, part: str, entry: list[Any]) -> None:
    """ValueError for a component whose folder lies elsewhere or whose class is not a library's: its code is not run."""
    named = len(entry) == 2 and all(isinstance(word, str) for word in entry) and entry[1].isidentifier()
    if not (named and re.fullmatch(r"[A-Za-z]\w*", part)):
        raise ValueError(f"{path} is damaged: its component {part!r} is {entry}; it is [library, class] of a folder")
    library = entry[0]
    own = Path(importlib.util.find_spec("diffusers").origin).parent / "pipelines"  # "stable_diffusion", for one
    if library not in LIBRARIES and not (library.isidentifier() and (own / library).is_dir()):
        raise ValueError(f"{path.parent}: component {part} is of {library!r}, code that is not run from here")
