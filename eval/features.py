"""A folder of images -> features on disk, cached by the hash of images, resize and extractor; read back in chunks.

python -m eval.features --folder runs/images/a --extractor inception-clean
accelerate launch --num_processes 8 -m eval.features --folder runs/images/a --extractor dinov2

A chunk of 1,000 images is a file that appears complete or not at all: what was killed goes on with the chunks that are
missing. Every process takes its own chunks. Memory holds a few batches of images; features are mapped from disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data import images
from eval.extractors import Extractor, cache_folder, device, load
from eval.images import manifest_of
from eval.protocols import Prepare
from eval.resize import resize

CHUNK = 1000  # images of a file


@dataclass(frozen=True)
class Features:
    """The outputs of an extractor for a set of images, in the order of the files' names."""

    folder: Path  # of the chunks
    n: int
    images: str  # hash of the images' files
    extractor: str
    extractor_hash: str

    @cached_property
    def _files(self) -> list[dict[str, Tensor]]:
        from safetensors.torch import load_file

        return [load_file(file) for file in _chunk_files(self.folder, self.n)]  # mapped, not read

    def chunks(self, key: str = "features") -> Iterator[Tensor]:
        """[k, D] in float64, k <= 1000, one after another. ValueError where the extractor does not give `key`."""
        if key not in self._files[0]:
            raise ValueError(f"extractor {self.extractor} gives {', '.join(self._files[0])}, no {key}")
        yield from (chunk[key].double() for chunk in self._files)

    def rows(self, index: Tensor | None = None, key: str = "features") -> Tensor:
        """The rows `index` [M] in float64 [M, D], in that order; by default all, which takes memory."""
        if index is None:
            return torch.cat(list(self.chunks(key)))
        files, found = index // CHUNK, None
        for i, chunk in enumerate(self._files):
            where = (files == i).nonzero()[:, 0]
            picked = chunk[key][index[where] - i * CHUNK].double()
            found = picked.new_empty((len(index), picked.shape[1])) if found is None else found
            found[where] = picked
        assert found is not None
        return found


def listing(folder: str | Path) -> list[Path]:
    """The image files below a folder, sorted. ValueError for an absent or empty one, or one unlike its manifest."""
    manifest = manifest_of(folder)
    there = images.files(folder)
    files = [file for file in there if images.is_image(file)]
    if not files:
        raise ValueError(f"{folder} holds no image. {images.unread(there)}".rstrip(". "))
    if odd := [file for file in files if not file.is_file()]:
        raise ValueError(f"{odd[0]} is no regular file, or a link whose file is gone: remove or replace it")
    if manifest and manifest.get("n") != len(files):
        raise ValueError(
            f"{folder} holds {len(files)} images, its manifest says {manifest.get('n')}; generate it again"
        )
    return files


def images_hash(files: list[Path]) -> str:
    """16 hex digits of BLAKE2b over the contents of the files in their order."""
    total = hashlib.blake2b(digest_size=8)
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "blake2b").digest())
    return total.hexdigest()


def features(
    folder: str | Path,
    extractor: Extractor,
    prepare: Prepare = Prepare(),
    first: int | None = None,
    batch: int = 64,
    workers: int = 4,
) -> Features:
    """The features of a folder of images, from the cache or made now, with a progress bar.

    prepare: what the protocol does to an image before the extractor's own rule. first: only so many images. workers:
    threads that read and resize. ValueError, naming the file, for a corrupt image, for sizes that differ after both
    rules (in a generated folder: at all), and for NaN among the features.
    """
    from tqdm import tqdm

    from pipelines.run import launched

    files = listing(folder)[:first]
    contents = images_hash(files)
    key = json.dumps([contents, asdict(prepare), extractor.rule, extractor.name, extractor.hash])
    where = cache_folder() / "features" / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    found = Features(where, len(files), contents, extractor.name, extractor.hash)
    parts = _chunk_files(where, len(files))
    missing = [c for c, part in enumerate(parts) if not part.is_file()]
    accelerator = launched()
    if accelerator.is_main_process and (unread := images.unread(images.files(folder))):
        sys.stderr.write(f"{folder}: {unread}\n")
    accelerator.wait_for_everyone()  # all have looked before one begins
    if missing:
        where.mkdir(parents=True, exist_ok=True)
        for left in where.glob("*.part"):  # of processes that were killed
            if accelerator.is_main_process and time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        mine = [c for c in missing if c % accelerator.num_processes == accelerator.process_index]
        size = _opened(files[0], prepare, extractor.rule)[0] if manifest_of(folder) else None
        total = sum(len(files[c * CHUNK : (c + 1) * CHUNK]) for c in mine)
        title = f"{extractor.name} {Path(folder).name}"
        hidden = not accelerator.is_main_process
        with tqdm(total=total, unit="image", desc=title, leave=False, disable=hidden) as bar:
            for c in mine:
                some = files[c * CHUNK : (c + 1) * CHUNK]
                _save(parts[c], _outputs(_batches(some, prepare, extractor.rule, size, batch, workers), extractor, bar))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (where / "about.json").write_text(json.dumps({"n": len(files), "key": json.loads(key)}) + "\n")
    return found


def _chunk_files(where: Path, n: int) -> list[Path]:
    return [where / f"{start:09d}-{min(start + CHUNK, n):09d}.safetensors" for start in range(0, n, CHUNK)]


def _outputs(batches: Iterator[tuple[list[Path], Tensor]], extractor: Extractor, bar: Any) -> dict[str, Tensor]:
    """All outputs of the network for some batches."""
    outputs = []
    for names, batch in batches:
        with torch.no_grad():
            made = {k: v.float().cpu() for k, v in extractor.net(batch.to(device())).items()}
        bad = ~torch.isfinite(made["features"]).all(1)
        if bad.any():
            raise ValueError(f"the features of {names[int(bad.nonzero()[0])]} are NaN or infinite")
        outputs.append(made)
        bar.update(len(names))
    return {k: torch.cat([made[k] for made in outputs]) for k in outputs[0]}


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """A file that appears complete or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    os.replace(part, path)


def _batches(
    files: list[Path], prepare: Prepare, rule: str, size: tuple[int, int] | None, batch: int, workers: int
) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of resized images, two of them read ahead."""
    groups = [files[i : i + batch] for i in range(0, len(files), batch)]
    ahead: deque[list[Future[tuple[tuple[int, int], np.ndarray]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for i in range(len(groups) + 1):
            if i < len(groups):
                ahead.append([pool.submit(_opened, file, prepare, rule) for file in groups[i]])
            if i == 0:
                continue
            names, found = groups[i - 1], [future.result() for future in ahead.popleft()]
            for name, (was, array) in zip(names, found):
                if size is not None and was != size:
                    raise ValueError(
                        f"{name} is {was[0]} x {was[1]}, others are {size[0]} x {size[1]}; one size a folder"
                    )
                if array.shape != found[0][1].shape:
                    raise ValueError(
                        f"{name} comes out as {array.shape}, {names[0].name} as {found[0][1].shape}; images of "
                        f"different sizes need a protocol that brings them to one"
                    )
            yield names, torch.from_numpy(np.stack([array for _, array in found]))


def _opened(file: Path, prepare: Prepare, rule: str) -> tuple[tuple[int, int], np.ndarray]:
    """The size of an image and its pixels after both rules."""
    try:
        image = images.read(file)
    except images.Broken as error:
        raise ValueError(f"{error}; remove or replace it") from None
    try:
        return image.size, resize(prepare(image), rule)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def text_features(prompts: list[str], extractor: Extractor, batch: int = 256) -> Tensor:
    """Prompts -> [N, D] in float64 by the extractor's text encoder, cached. ValueError where it has none."""
    from safetensors.torch import load_file
    from tqdm import tqdm

    if extractor.text is None:
        raise ValueError(f"extractor {extractor.name} reads no text; choose clip or open_clip")
    key = json.dumps([prompts, extractor.name, extractor.hash])
    path = cache_folder() / "features" / f"text-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.safetensors"
    if not path.is_file():
        starts = tqdm(range(0, len(prompts), batch), desc=f"{extractor.name} prompts", leave=False)
        made = torch.cat([extractor.text(prompts[i : i + batch]).float() for i in starts])
        _save(path, {"features": made})
    return load_file(path)["features"].double()


def extract(folder: tuple[Path, ...], extractor: str = "inception-clean", batch: int = 64, workers: int = 4) -> None:
    """Make the features of folders of images.

    Args:
        folder: one or more folders of images.
        extractor: NAME or NAME:WEIGHTS, see eval/extractors.py.
        batch: images per call of the network.
        workers: threads that read and resize.
    """
    net = load(extractor)
    for path in folder:
        features(path, net, batch=batch, workers=workers)


if __name__ == "__main__":
    from eval.cli import run

    run(extract)
