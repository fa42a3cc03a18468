"""The components of a diffusers pipeline folder."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipelines import fields
from pipelines.protocols import Network, Pipeline, Scheduler

NEEDED = ("unet", "transformer", "vae", "scheduler")  # components that may not be null if the index names them
EDM_NETS = ("pipelines.edm_nets", "distill.pipelines.edm_nets")  # names of that module in a checkout and in the wheel
LIBRARIES = ("diffusers", "transformers", *EDM_NETS)  # libraries whose classes are allowed as components


class ExportError(Exception):
    """An exported pipeline gives other samples than the student."""


class Parts:
    """The components of a local pipeline folder. Each is loaded at its first use.

    A run with cached prompts and images never loads a text encoder, and loads a VAE only for sample grids.
    variant: variant of the weight files ("fp16"). dtype: precision of the network. precision: that of text encoders and
    VAE.
    """

    adapt_network: Callable[[Network], Network] | None = None  # applied to the network after loading

    def __init__(self, folder: str | Path, variant: str | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.folder = Path(folder)
        self.variant = variant
        self.dtype = dtype
        self.index = read_index(folder)
        if variant and not any(has_variant(part, variant) for part in self.folder.iterdir()):
            raise ValueError(f"no component of {folder} has weights of the variant {variant!r}: leave --variant out")
        self.precision = torch.float32
        self.device = torch.device("cpu")  # device of encoders and VAE; the trainer moves the network
        self.given: dict[str, object] = {}  # components that replace those of the folder
        self.asked: dict[str, int] = {}  # a requested size that is not the teacher's own: "resolution", "frames"

    @property
    def network(self) -> str:
        """The name of the denoising component: "unet" or "transformer"."""
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
        self.validate_component(name)
        cls: Any = getattr(importlib.import_module(library), kind, None) if library in LIBRARIES else None
        try:
            loads, weights = (hasattr(cls, method) for method in ("from_pretrained", "parameters"))
        except ImportError as error:  # the class needs a library that is not installed
            raise ValueError(f"{self.folder}: its {name} is a {kind}: {' '.join(str(error).split())}") from None
        if not loads:
            raise ValueError(f"{self.folder}: its {name} is a {kind} of {library}, which has no such class")
        variant = self.variant if has_variant(self.folder / name, self.variant) else None
        options = {"variant": variant, "use_safetensors": True, "dtype": dtype or self.precision}
        options = options if weights else {}  # a scheduler or a tokenizer has no weights
        try:
            found = cls.from_pretrained(self.folder, subfolder=name, local_files_only=True, **options)
        except Exception as error:  # classes raise many kinds of errors for a bad config
            raise ValueError(f"{self.folder}: its {name} ({kind}) cannot be read: {error}") from error
        if self.adapt_network is not None and name == self.network:
            found = self.adapt_network(found)
        return found.requires_grad_(False).eval() if options else found

    def config(self, name: str) -> dict[str, Any]:
        """The config of a component, without loading it."""
        return fields.read(self.folder / name / "config.json")

    def validate_component(self, name: str) -> None:
        """ValueError for a component whose class cannot use its config, or whose weights exist only as pickles."""
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
    def net(self) -> Network:
        return self.component(self.network, self.dtype)

    @cached_property
    def vae(self) -> Any:
        return self.component("vae").to(self.device)

    @cached_property
    def text(self) -> Pipeline:
        """A pipeline with only the text encoders and tokenizers, for encode_prompt."""
        for name, entry in self.index.items():  # SD3's third encoder may be null
            if name.startswith(("text_encoder", "tokenizer")) and entry[:1] == [None] and not name.endswith("_3"):
                raise ValueError(
                    f"{self.folder}: its model_index.json has no {name} (null), which encodes prompts: name one"
                )
        return self.pipeline({self.network: None, "vae": None}).to(self.device)

    def drop_text(self) -> None:
        """Free the memory of the text encoders."""
        self.__dict__.pop("text", None)

    def scheduler(self) -> Scheduler:
        """A new object of the pipeline's own scheduler."""
        return self.component("scheduler")

    def pipe(self, **given: object) -> Pipeline:
        """The complete pipeline with the teacher's network. `given` replaces components."""
        vae = {"vae": self.vae} if "vae" in self.index else {}  # pixel models have none
        return self.pipeline({self.network: self.net} | vae | given)

    def pipeline(self, given: dict[str, object]) -> Pipeline:
        """The pipeline of the folder. `given` replaces components; None means that a component is not loaded."""
        import diffusers

        cls = getattr(diffusers, self.index["_class_name"])
        absent = [name for name, entry in self.index.items() if isinstance(entry, list) and entry[0] is None]
        absent += [name for name in ("safety_checker",) if name in self.index]
        given = dict.fromkeys(absent) | given
        options = {"variant": self.variant, "dtype": self.precision, "local_files_only": True}
        for name in {name for name, entry in self.index.items() if isinstance(entry, list)} - given.keys():
            self.validate_component(name)
        try:
            pipe = cls.from_pretrained(self.folder, use_safetensors=True, **options, **self.given | given)
        except Exception as error:  # many kinds of errors, as above
            raise ValueError(f"{self.folder}: its {cls.__name__} cannot be read: {error}") from error
        pipe.set_progress_bar_config(disable=True)
        return pipe


def has_variant(component: Path, variant: str | None) -> bool:
    """Whether a component's folder has safetensors of a variant. If not, the plain files are loaded."""
    if not variant or not component.is_dir():
        return False
    return any(f.suffix in (".safetensors", ".json") and is_variant(f, variant) for f in component.iterdir())


def is_variant(file: Path, variant: str) -> bool:
    """Whether a file name belongs to weights of a variant, for example model.fp16-00001-of-00002.safetensors."""
    return ".safetensors" in file.name and re.search(rf"\.{re.escape(variant)}[.-]", file.name) is not None


def locate_pipeline(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a pipeline. A name on the Hub is downloaded."""
    folder = Path(name)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from diffusers import DiffusionPipeline

        try:
            folder = Path(DiffusionPipeline.download(name, revision=revision, variant=variant, use_safetensors=True))
        except (OSError, ValueError) as error:
            raise ValueError(f"no pipeline {name!r}, as a folder or on the Hub: {error}") from None
    named = [part for part, entry in read_index(folder).items() if isinstance(entry, list) and entry[0] is not None]
    if missing := [part for part in named if not (folder / part).is_dir()]:
        raise ValueError(
            f"{folder} is not a complete pipeline: model_index.json names {', '.join(missing)}, and there is no such "
            "folder: download or copy all of it"
        )
    return folder


def read_index(folder: str | Path) -> dict[str, Any]:
    """The content of model_index.json in a pipeline folder. The ValueError says what is missing."""
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
            _validate_entry(path, part, entry)
    return found


def _validate_entry(path: Path, part: str, entry: list[object]) -> None:
    """ValueError for a component in another folder, or of another library's class: its code is not run."""
    words = [word for word in entry if isinstance(word, str)]
    named = len(entry) == len(words) == 2 and words[1].isidentifier()
    if not (named and re.fullmatch(r"[A-Za-z]\w*", part)):
        raise ValueError(f"{path} is damaged: its component {part!r} is {entry}; it is [library, class] of a folder")
    library = words[0]
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None and spec.origin is not None, "diffusers is a requirement of this package"
    pipelines = Path(spec.origin).parent / "pipelines"  # for example "stable_diffusion"
    if library not in LIBRARIES and not (library.isidentifier() and (pipelines / library).is_dir()):
        raise ValueError(f"{path.parent}: component {part} is of {library!r}, code that is not run from here")
    if library in EDM_NETS:
        importlib.import_module(f"{__package__}.edm_nets")  # diffusers then finds it under both names
