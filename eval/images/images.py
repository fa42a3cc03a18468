"""A folder of images: 8-bit PNG files 000000.png ... and a manifest.json that says what they are.

Stages exchange such folders and nothing else. metadata.jsonl holds the prompts, if there are any: a line of
{"file_name", "text"} for each image. Images are written one by one, each atomically. Until the last one is written, the
manifest says "complete": false, and other stages refuse the folder.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data import images as reader
from distill.files import atomic_file, atomic_folder
from eval.files import check_output
from eval.images.manifest import MANIFEST, Manifest, read_manifest, write_manifest


def quantize(images: Tensor) -> Tensor:
    """Images in [-1, 1], any shape -> uint8, the nearest of 256 levels; values beyond the range are clamped."""
    return ((images.double().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def restore(levels: Tensor) -> Tensor:
    """The inverse of `quantize`: uint8 -> float32 in [-1, 1]."""
    return (levels.double() / 127.5 - 1).float()


def image_digest(level: Tensor) -> str:
    """The SHA-256 of one uint8 image [C, H, W]: its shape and pixels."""
    return hashlib.sha256(repr(tuple(level.shape)).encode() + level.contiguous().numpy().tobytes()).hexdigest()


def combine_digests(digests: Iterable[str]) -> str:
    """The first 16 hex digits of the SHA-256 of the images' digests in order: the hash of a folder."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def file_name(i: int) -> str:
    """000042.png"""
    return f"{i:06d}.png"


def save_image(folder: Path, i: int, level: Tensor) -> None:
    """Write image i, uint8 [C, H, W] with C = 1 or 3, atomically."""
    from PIL import Image

    array = level.permute(1, 2, 0).numpy()
    with atomic_file(folder / file_name(i), sync=False) as part:
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(part, format="PNG")


def read_levels(file: Path) -> Tensor:
    """An image as uint8 [C, H, W], C = 1 or 3. ValueError, naming the file, for one that cannot be read."""
    try:
        array = np.array(reader.read(file))
    except reader.UnreadableImage as error:
        raise ValueError(f"{error}; remove or replace it") from None
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def write_folder(
    folder: str | Path,
    images: Tensor,
    labels: Tensor | Sequence[int] | None = None,
    overwrite: bool = False,
    **meta: object,
) -> Manifest:
    """Store images [N, C, H, W] in [-1, 1], C = 1 or 3, as 000000.png ... with a manifest, and return the manifest.

    The manifest holds n, shape, the pixels' hash, labels [N] (or null) and `meta` (model, seed, nfe, seconds ...). The
    folder is written atomically. ValueError for a wrong shape, NaN, or a folder in use (unless `overwrite`).
    """
    folder = Path(folder)
    if images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {list(images.shape)}; [N, C, H, W] with N >= 1 and C = 1 or 3 is needed")
    finite = torch.isfinite(images.flatten(1)).all(1)
    if not finite.all():
        raise ValueError(f"image {(~finite).nonzero()[0].item()} holds NaN or infinite values; nothing was written")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images; one label per image is needed")
    check_free(folder, overwrite)
    levels = quantize(images.detach().cpu())
    manifest = {
        **meta,
        "n": len(levels),
        "shape": list(levels.shape[1:]),
        "hash": combine_digests(map(image_digest, levels)),
        "labels": None if labels is None else torch.as_tensor(labels).tolist(),
    }
    with atomic_folder(folder) as part:
        for i, image in enumerate(levels):
            save_image(part, i, image)
        write_manifest(part, manifest)
    return manifest


def check_free(folder: Path, overwrite: bool = False) -> None:
    """ValueError unless images may be written to `folder`: absent, empty, or with `overwrite` a folder of images."""
    check_output(folder, "the output", folder=True)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} is not empty; choose another folder, or overwrite it on purpose")
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has no {MANIFEST}, so it is not a folder of images; choose another")


def list_images(folder: str | Path) -> list[Path]:
    """The image files below a folder, sorted. Prints once how many files are not images.

    ValueError for an absent or empty folder, for a number of images that differs from the manifest, and for an image
    that is no regular file.
    """
    manifest = read_manifest(folder)
    all_files = reader.files(folder)
    files = [file for file in all_files if reader.is_image(file)]
    others = reader.describe_unread(all_files)
    if not files:
        raise ValueError(f"{folder} holds no image. {others}".rstrip(". "))
    if odd := [file for file in files if not file.is_file()]:
        raise ValueError(f"{odd[0]} is not a regular file, or it is a broken link: remove or replace it")
    if manifest and manifest.get("n") != len(files):
        raise ValueError(
            f"{folder} holds {len(files)} images, its manifest says {manifest.get('n')}; generate it again"
        )
    if others:
        warn_once(f"{folder}: {others}\n")
    return files


@cache
def warn_once(line: str) -> None:
    """Write a line to stderr, once."""
    sys.stderr.write(line)


def read_folder(folder: str | Path, first: int | None = None) -> tuple[Tensor, Tensor | None, Manifest]:
    """Folder -> (images float32 [N, C, H, W] in [-1, 1], labels [N] or None, manifest or {}).

    All images of the folder must have one size. first: read only so many. ValueError, naming the file, for an
    empty folder, mixed sizes, a corrupt image, or pixels that are not those of the manifest.
    """
    manifest = read_manifest(folder)
    files = list_images(folder)
    images: list[Tensor] = []
    for file in files[:first]:
        images.append(read_levels(file))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{file} is {_size(images[-1])}, but {files[0].name} is {_size(images[0])}; "
                "one folder, one size and mode"
            )
    levels = torch.stack(images)
    if manifest and len(levels) == len(files) and manifest.get("hash") != combine_digests(map(image_digest, levels)):
        raise ValueError(f"the images of {folder} are not those that its manifest describes; generate it again")
    labels = manifest.get("labels")
    return restore(levels), None if labels is None else torch.tensor(labels)[: len(levels)], manifest


def _size(image: Tensor) -> str:
    return f"{image.shape[2]} x {image.shape[1]} with {image.shape[0]} channel(s)"
