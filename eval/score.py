"""Folders of digit images -> one row of figures each.

python -m eval.score --folder runs/samples/teacher-18 runs/samples/dmd2 --out runs/scores.json
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.data import digits
from eval import images as folders
from eval.features import Extractor, extractor
from eval.metrics import accuracy, frechet, precision_recall


class Reference(NamedTuple):
    """The real digits' features under one extractor, and how far apart the two splits are: the floor."""

    extractor: Extractor
    train: Tensor  # [1200, 64]
    heldout: Tensor  # [597, 64]
    floor: float  # Frechet distance of train and held-out


@cache
def reference() -> Reference:
    """Features of both splits, after the same rounding to 8 bits that generated images go through."""
    net = extractor()
    train, heldout = (net(folders.restore(folders.quantize(digits(split)[0])))[0] for split in ("train", "heldout"))
    return Reference(net, train, heldout, frechet(train, heldout))


def score(folder: str | Path) -> dict[str, Any]:
    """One folder of digit images -> a row.

    fd_heldout, fd_train: Frechet distances to the 597 held-out and the 1,200 training digits. precision, recall: to
    the training digits, n_manifold samples on both sides. accuracy: images that the classifier reads as the label they
    were asked for (null without labels). floor_fd_heldout: the distance of the two real splits. ValueError as in
    `images.read` and `metrics`.
    """
    real = reference()
    images, labels, manifest = folders.read(folder)
    try:
        feats, logits = real.extractor(images)
        precision, recall, n_manifold = precision_recall(real.train, feats)
        distances = frechet(feats, real.heldout), frechet(feats, real.train)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return {
        "model": manifest.get("name", Path(folder).name),
        "student": manifest.get("student"),
        "nfe": manifest.get("nfe"),
        "fd_heldout": distances[0],
        "fd_train": distances[1],
        "accuracy": None if labels is None else accuracy(logits, labels),
        "precision": precision,
        "recall": recall,
        "n": len(images),
        "n_manifold": n_manifold,
        "seed": manifest.get("seed"),
        "images_per_second": manifest.get("images_per_second"),
        "floor_fd_heldout": real.floor,
        "extractor": real.extractor.hash,
        "images": manifest.get("hash"),
    }


def scores(folder: tuple[Path, ...], out: Path | None = None) -> list[dict[str, Any]]:
    """Score folders of digit images against the held-out and the training digits.

    Args:
        folder: one or more folders of images.
        out: where the rows go, as JSON.
    """
    from tqdm import tqdm

    if not folder:
        raise ValueError("no folder was given; name at least one after --folder")
    for path in folder:
        folders.manifest_of(path)  # an absent folder ends it here, before the classifier is trained
    rows = [score(path) for path in tqdm(folder, unit="folder", desc="score", leave=False, disable=len(folder) < 2)]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def main() -> None:
    """Command line of `scores`."""
    from rich.console import Console

    from eval.cli import run
    from eval.report import table

    torch.set_num_threads(1)
    rows = run(scores)
    Console().print(table(rows, {"fd_heldout": rows[0]["floor_fd_heldout"]}))


if __name__ == "__main__":
    main()
