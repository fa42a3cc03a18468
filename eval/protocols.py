"""Protocols: the exact definition of a measurement. Figures of different protocols are not comparable.

A protocol fixes the prompts or labels, the number, size and seeds of the images, the preparation of generated and
reference images before each extractor, and the metrics. Its hash covers all of these, so two figures with one hash are
comparable. The user puts data into $DISTILL_DATA/NAME, by default data/NAME; `missing` lists what is needed.

python -m eval.protocols           the list, each with its hash and what is missing
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = ("prompts.txt", "prompts.jsonl", "prompts.parquet")


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
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()

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
        if reference and path is not None and not _is_present(path):
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


def _is_present(path: Path) -> bool:
    if path.suffix:
        return path.is_file()
    from distill.data import images

    return path.is_dir() and any(map(images.is_image, images.files(path)))


def find_protocol(name: str) -> Protocol:
    """A protocol by its name; ValueError with the list of names."""
    if name not in PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


G14 = "open_clip:ViT-g-14/laion2b_s12b_b42k"
WHOLE = Preparation()
SQUARE = Preparation("square", 256)
CLIP = Measure("clip_score", G14, SQUARE, text="A photo depicts")

_COCO30K = Protocol(
    name="coco30k-gigagan",
    data="coco30k-gigagan",
    n=30_000,
    size=512,
    measures=(Measure("fid", "inception-clean", SQUARE, SQUARE), CLIP),
    reference="reference",
    references=40_504,
    prompts="the 30,000 captions of COCO 2014 val that GigaGAN, DMD2 and SiD-LSG use, one a line in their order",
    source="the 40,504 images of COCO 2014 val (val2014.zip), as they are",
    notes="DMD2 reports FID 8.35 for SD 1.5, SiD-LSG 8.15. DMD2 leaves the CLIP score off here by default. Their noise "
    "is seeded by the number of the batch, SiD-LSG's by seeds 0 .. 29999; ours by (seed, i), so images differ.",
)
_COCO10K = Protocol(
    name="coco10k-dmd2",
    data="coco10k-dmd2",
    n=10_000,
    size=1024,
    measures=(
        Measure("fid", "inception-clean", Preparation("square", 512), Preparation("square", 512)),
        Measure("patch_fid", "inception-clean", Preparation(299), Preparation(299)),
        CLIP,
    ),
    reference="reference",
    references=10_000,
    prompts="the 10,000 captions of COCO 2014 val of DMD2's coco10k (one of an image), one a line, in its order",
    source="the 10,000 images of these captions, of DMD2's coco10k, as they are",
    notes="Each text encoder of SDXL reads by its own tokenizer. The authors' test script gave the second one the "
    "first's, which pads otherwise: that variant is coco10k-dmd2-tokenizer1. Published figures may carry it, so a "
    "reproduction reports both. An image smaller than 299 pixels on a side is not cropped but resized for patch FID.",
)

PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        _COCO30K,
        _COCO10K,
        replace(
            _COCO10K,
            name="coco10k-dmd2-tokenizer1",
            components=(("tokenizer_2", "tokenizer"),),
            notes="coco10k-dmd2 with SDXL's second text encoder fed by the first one's tokenizer, as in the authors' "
            "test script (test_folder_sdxl); pipelines without tokenizer_2 are refused.",
        ),
        Protocol(
            name="mjhq30k",
            data="mjhq30k",
            n=30_000,
            size=1024,
            measures=(
                Measure("fid", "inception-clean", WHOLE, WHOLE),
                Measure("clip_score", "open_clip:ViT-L-14/openai", WHOLE),
            ),
            reference="reference",
            references=30_000,
            prompts="the 30,000 prompts of the data set playgroundai/MJHQ-30K, from its meta_data.json in that order",
            source="the 30,000 images of playgroundai/MJHQ-30K, as they are",
            notes="All of FID at 1024 x 1024, over the ten categories together. Which CLIP a paper used differs.",
        ),
        Protocol(
            name="imagenet64-edm",
            data="imagenet64-edm",
            n=50_000,
            size=64,
            measures=(Measure("fid", "inception-legacy", WHOLE, WHOLE),),
            classes=1000,
            reference="imagenet-64x64.npz",
            references=1_281_167,
            seeds=(0, 1, 2),
            source="EDM's reference statistics of ImageNet 64 x 64 (mu [2048], sigma [2048, 2048])",
            notes="8 bits by rounding. Labels are i % 1000 as in DMD2, one draw there; EDM draws labels uniformly and "
            "reports the least FID of three draws: here every seed is a row, and the mean is reported.",
        ),
        Protocol(
            name="cifar10-edm",
            data="cifar10-edm",
            n=50_000,
            size=32,
            measures=(Measure("fid", "inception-legacy", WHOLE, WHOLE),),
            classes=10,
            reference="cifar10-32x32.npz",
            references=50_000,
            seeds=(0, 1, 2),
            source="EDM's reference statistics of the CIFAR-10 training images (mu [2048], sigma [2048, 2048])",
            notes="8 bits by rounding. Models without labels ignore them. Papers report the least FID of three draws; "
            "here every seed is a row, and the mean is reported.",
        ),
        Protocol(
            name="digits",
            data="digits",
            n=2_000,
            size=8,
            measures=(
                Measure("fd_heldout", "digits", WHOLE, WHOLE),
                Measure("fd_train", "digits", WHOLE, WHOLE),
                Measure("accuracy", "digits", WHOLE),
                Measure("precision_recall", "digits", WHOLE, WHOLE),
            ),
            classes=10,
            references=597,
            seeds=(0, 1, 2),
            source="scikit-learn's digits: 597 held-out ones, and the 1,200 of training",
            notes="Nothing has to be brought. A Frechet distance of 64 features of a small classifier depends on both "
            "numbers of images: the distance of the two real splits is the floor of fd_heldout.",
        ),
    )
}


def list_protocols() -> None:
    """List every protocol with its hash, its metrics and what is missing here to use it."""
    for p in PROTOCOLS.values():
        what = "prompts" if p.classes is None else f"labels i % {p.classes}"
        metrics = ", ".join(f"{m.metric} ({m.extractor})" for m in p.measures)
        notes = "".join(f"  {line}\n" for line in (p.notes, p.missing() or "") if line)
        sys.stdout.write(f"{p.name}  {p.hash}  {p.n:,} images of {p.size} pixels, {what}, seeds {p.seeds}\n")
        sys.stdout.write(f"  {metrics}\n{notes}\n")


def main() -> None:
    from eval.cli import run

    run(list_protocols)


if __name__ == "__main__":
    main()
