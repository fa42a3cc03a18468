"""The published protocols, by their names. `find_protocol` reads files too (eval/protocol_files.py).

python -m eval.protocols                 the list, each with its hash and what is missing
python -m eval.protocols own.yaml        whether a file is a protocol
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from eval.files import list_names
from eval.protocol import Measure, Preparation, Protocol
from eval.protocol_files import is_file_name, read_protocol

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


def find_protocol(name: str) -> Protocol:
    """A protocol by its name, or of a file. ValueError, with the nearest and all names, for an unknown name."""
    if is_file_name(name):
        own = read_protocol(Path(name))
        if own.name in PROTOCOLS:
            raise ValueError(f"{name} is called {own.name}, as a published protocol: give it another name")
        return own
    if name not in PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r}; {list_names(name, PROTOCOLS)}; or name a .yaml file")
    return PROTOCOLS[name]


def list_protocols(protocol: Annotated[tuple[str, ...], tyro.conf.Positional] = ()) -> None:
    """List protocols, each with its hash, its metrics and what is missing here to use it.

    Args:
        protocol: names, or .yaml files to check; by default all names.
    """
    for p in map(find_protocol, protocol or PROTOCOLS):
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
