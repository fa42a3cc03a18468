"""`Protocol`: the exact definition of a measurement. Figures of different protocols are not comparable.

A protocol fixes the prompts or labels, the number, size and seeds of the images, the preparation of generated and
reference images before each extractor, and the metrics. Its hash covers all of these, so two figures with one hash are
comparable. The user puts data into $DISTILL_DATA/NAME, by default data/NAME; `missing` lists what is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from eval.files import images_hash

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = ("prompts.txt", "prompts.jsonl", "prompts.parquet")


def hash_fields(fields: dict[str, object]) -> str:
    """16 hex digits of BLAKE2b of fields as canonical JSON."""
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


def data_folder() -> Path:
    """The folder of the protocols' data: $DISTILL_DATA, by default `data` in the current folder."""
    return Path(os.environ.get("DISTILL_DATA", "data"))


@dataclass(frozen=True)
class Preparation:
    """The crop and the size of an image before an extractor resizes it by its own rule.

    crop: "square", the centre of the longer side (an odd rest goes to the right or below, floor((W - H) / 2) on the
    left); a number N, the centre N x N pixels, images smaller on a side stay whole; None.
    size: then resized to size x size by `filter` of PIL, 8 bits. A square of that size already is left as it is.
    """

    crop: Literal["square"] | int | None = None
    size: int | None = None
    filter: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"

    def __call__(self, image: Image) -> Image:
        from PIL import Image

        width, height = image.size
        side = min(width, height) if self.crop == "square" else self.crop
        if side is not None and side <= min(width, height):
            left = (width - side) // 2
            top = (height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if self.size is not None and image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling[self.filter.upper()])
        return image


@dataclass(frozen=True)
class Measure:
    """One number, or a pair of them, of a protocol.

    extractor: "inception-clean", the 2015 Inception on PIL's bicubic 299 x 299 in float (clean-fid); its first layers
    resize themselves in "inception-legacy" (TensorFlow's bilinear, as StyleGAN and EDM); "open_clip:MODEL/WEIGHTS";
    "digits", the small classifier of the digits.
    text: tokens put before a caption's own, after the start token, cut at the text encoder's length.
    """

    metric: str
    extractor: str
    generated: Preparation = Preparation()
    reference: Preparation | None = None  # None: the metric needs none
    text: str = ""

    @property
    def hash_fields(self) -> dict[str, object]:
        """Its part of a protocol's hash: of a metric in a file the content."""
        path = Path(self.metric)
        content = f"{path.stem} {images_hash([path])}" if path.suffix == ".py" else self.metric
        return asdict(self) | {"metric": content}


@dataclass(frozen=True)
class Protocol:
    """A complete definition of a measurement; see the module."""

    name: str
    data: str  # its folder below data_folder(): protocols may share one
    n: int  # images of a seed
    size: int  # pixels of a side of a generated image
    measures: tuple[Measure, ...]  # the first is the headline
    classes: int | None = None  # label of image i: i % classes; None: prompt i of the prompts' file
    reference: str | None = None  # folder of images or statistics (.npz with mu and sigma) below `data`; None: built in
    references: int = 0  # images of the reference
    seeds: tuple[int, ...] = (0,)  # noise of image i is a function of (seed, i)
    components: tuple[tuple[str, str], ...] = ()  # (a, b): component a of the pipeline is replaced by its component b
    prompts: str = ""  # what the prompts are, and where they come from
    source: str = ""  # what the reference is, and where it comes from
    notes: str = ""  # not part of the hash

    @property
    def hash(self) -> str:
        """16 hex digits of BLAKE2b of all fields but the notes, as canonical JSON."""
        fields = {key: value for key, value in asdict(self).items() if key != "notes"}
        return hash_fields(fields | {"measures": [m.hash_fields for m in self.measures]})

    @property
    def sampling_hash(self) -> str:
        """The hash of what images depend on."""
        return self.hash

    @property
    def address(self) -> str:
        """What a command names it by."""
        return self.name

    @property
    def per_prompt(self) -> int:
        """Images of each prompt: image i has prompt i // per_prompt."""
        return 1

    def with_reference(self, path: Path, files: Sequence[Path]) -> Self:
        """The protocol with other real images: the files of a folder, or statistics. Its hash is of their contents."""
        return replace(self, reference=None, references=len(files), source=images_hash(files))

    @property
    def folder(self) -> Path:
        return data_folder() / self.data

    @property
    def prompt_file(self) -> Path | None:
        """The file of the prompts; None for labels, and if the file is absent."""
        if self.classes is not None:
            return None
        return next((path for name in PROMPTS if (path := self.folder / name).is_file()), None)

    @property
    def reference_path(self) -> Path | None:
        """The folder or file of the reference, which may be absent; None for a built-in reference."""
        return None if self.reference is None else self.folder / self.reference

    def missing(self, reference: bool = True) -> str | None:
        """The missing data and where to put them; None if nothing is missing. reference: whether it is needed too."""
        lines = []
        path = self.reference_path
        if self.classes is None and self.prompt_file is None:
            lines.append(f"{self.folder / PROMPTS[0]} (or .jsonl, .parquet): {self.prompts}")
        if reference and path is not None and not is_present(path):
            lines.append(f"{path}{'' if path.suffix else '/'}: {self.source}")
        return f"protocol {self.name} lacks data; put\n  " + "\n  ".join(lines) if lines else None

    def require(self, reference: bool = True) -> None:
        """ValueError with the message of `missing`, if data are missing."""
        if (message := self.missing(reference)) is not None:
            raise ValueError(message)

    def conditions(self, n: int | None = None) -> list[str] | list[int]:
        """The prompts or labels of the first n images, by default of all. ValueError if there are too few prompts."""
        n = self.n if n is None else n
        if self.classes is not None:
            return [i % self.classes for i in range(n)]
        from distill.data.sources import prompts

        self.require(reference=False)
        texts = prompts(str(self.prompt_file), limit=n)
        if len(texts) < n:
            raise ValueError(f"{self.prompt_file} holds {len(texts)} prompts; protocol {self.name} needs {n}")
        return texts


def is_present(path: Path) -> bool:
    """Whether a file of statistics is there, or a folder with an image."""
    if path.suffix:
        return path.is_file()
    if not path.is_dir():
        return False
    from distill.data import images

    return any(map(images.is_image, images.files(path)))
