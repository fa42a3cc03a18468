"""A folder of images -> features on disk, cached by the hash of images, resize and extractor; read back in chunks.

python -m eval.features --folder runs/images/a --extractor inception-clean
accelerate launch --num_processes 8 -m eval.features --folder runs/images/a --extractor dinov2

A chunk of 1,000 images is one file, written atomically. A killed command continues with the missing chunks. Every
process takes its own chunks. Memory holds a few batches of images; features are mapped from disk.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distill.data import images
from distill.files import atomic_file
from eval.cli import PartialFailure
from eval.features.extractors import Extractor, device, load
from eval.features.weights import cache_folder
from eval.files import images_hash, write_json
from eval.images.images import list_images, read_manifest
from eval.images.resize import resize
from eval.protocol import Preparation

if TYPE_CHECKING:
    from tqdm import tqdm

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
        """Tensors [k, D] in float64, k <= 1000. ValueError if the extractor has no output `key`."""
        if key not in self._files[0]:
            raise ValueError(f"extractor {self.extractor} gives {', '.join(self._files[0])}, no {key}")
        yield from (chunk[key].double() for chunk in self._files)

    def rows(self, index: Tensor | None = None, key: str = "features") -> Tensor:
        """The rows `index` [M] in float64 [M, D], in that order; by default all, which takes memory."""
        if index is None:
            return torch.cat(list(self.chunks(key)))
        files = index // CHUNK
        out = None
        for i, chunk in enumerate(self._files):
            where = (files == i).nonzero()[:, 0]
            picked = chunk[key][index[where] - i * CHUNK].double()
            out = picked.new_empty((len(index), picked.shape[1])) if out is None else out
            out[where] = picked
        assert out is not None
        return out


def features(
    folder: str | Path,
    extractor: Extractor,
    prepare: Preparation = Preparation(),
    first: int | None = None,
    batch: int = 64,
    workers: int = 4,
) -> Features:
    """The features of a folder of images, from the cache or computed with a progress bar.

    prepare: the protocol's rule for an image, applied before the extractor's own rule. first: use only so many images.
    workers: threads that read and resize. ValueError, with the file's name, for a corrupt image, for different sizes
    after both rules (in a generated folder: before them), and for NaN among the features. An error of one process ends
    all processes. A damaged chunk is computed again.
    """
    from distill.progress import bar
    from pipelines.launch import start_accelerator

    for name, number in (("batch", batch), ("workers", workers)):
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    files = list_images(folder)[:first]
    contents = images_hash(files)
    key = json.dumps([contents, asdict(prepare), extractor.rule, extractor.name, extractor.hash])
    where = cache_folder() / "features" / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    result = Features(where, len(files), contents, extractor.name, extractor.hash)
    parts = _chunk_files(where, len(files))
    missing = [c for c, part in enumerate(parts) if not is_complete(part, min(CHUNK, len(files) - c * CHUNK))]
    accelerator = start_accelerator()
    accelerator.wait_for_everyone()  # all have looked before one begins
    if missing:
        mine = [c for c in missing if c % accelerator.num_processes == accelerator.process_index]
        total = sum(len(files[c * CHUNK : (c + 1) * CHUNK]) for c in mine)
        title = f"{extractor.name} {Path(folder).name}"
        hidden = not accelerator.is_main_process
        error: Exception | None = None
        try:
            _prepare_folder(where, accelerator.is_main_process)
            size = _open_and_resize(files[0], prepare, extractor.rule)[0] if read_manifest(folder) else None
            with bar(total, "image", title, not hidden) as progress:
                for c in mine:
                    some = files[c * CHUNK : (c + 1) * CHUNK]
                    outputs = _outputs(
                        _batches(some, prepare, extractor.rule, size, batch, workers), extractor, progress
                    )
                    _save_tensors(parts[c], outputs)
        except Exception as caught:
            error = caught
        _raise_any_error(error)
        if accelerator.is_main_process:
            write_json(where / "about.json", {"n": len(files), "key": json.loads(key)})
    return result


def _prepare_folder(where: Path, remove: bool) -> None:
    """Make a folder, and remove partial files of killed processes."""
    where.mkdir(parents=True, exist_ok=True)
    for part in where.glob(".*.partial") if remove else ():
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()


def _raise_any_error(error: Exception | None) -> None:
    """Wait for all processes. If one has failed, all raise, so that none waits forever."""
    from accelerate.utils import gather_object

    reasons = gather_object([None if error is None else f"{error}"])
    if error is not None:
        raise error
    if others := [reason for reason in reasons if reason is not None]:
        raise ValueError(others[0])


def is_complete(file: Path, rows: int) -> bool:
    """Whether a feature file is complete and has `rows` rows per output; reads only the header."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = {key: stored.get_slice(key).get_shape() for key in stored.keys()}
    except (SafetensorError, OSError, ValueError):
        return False
    return "features" in shapes and all(len(shape) == 2 and shape[0] == rows for shape in shapes.values())


def _chunk_files(where: Path, n: int) -> list[Path]:
    return [where / f"{start:09d}-{min(start + CHUNK, n):09d}.safetensors" for start in range(0, n, CHUNK)]


def _outputs(batches: Iterator[tuple[list[Path], Tensor]], extractor: Extractor, bar: tqdm) -> dict[str, Tensor]:
    """All outputs of the network for some batches."""
    outputs = []
    for names, batch in batches:
        with torch.no_grad():
            tensors = {k: v.float().cpu() for k, v in extractor.net(batch.to(device())).items()}
        for key, values in tensors.items():
            bad = ~torch.isfinite(values).all(1)
            if bad.any():
                raise ValueError(f"the {key} of {names[int(bad.nonzero()[0])]} are NaN or infinite")
        outputs.append(tensors)
        bar.update(len(names))
    return {k: torch.cat([tensors[k] for tensors in outputs]) for k in outputs[0]}


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file

    with atomic_file(path) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part)


def _batches(
    files: list[Path], prepare: Preparation, rule: str, size: tuple[int, int] | None, batch: int, workers: int
) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of resized images, two of them read ahead."""
    groups = [files[i : i + batch] for i in range(0, len(files), batch)]
    ahead: deque[list[Future[tuple[tuple[int, int], np.ndarray]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for i in range(len(groups) + 1):
            if i < len(groups):
                ahead.append([pool.submit(_open_and_resize, file, prepare, rule) for file in groups[i]])
            if i == 0:
                continue
            names = groups[i - 1]
            images_read = [future.result() for future in ahead.popleft()]
            for name, (was, array) in zip(names, images_read):
                if size is not None and was != size:
                    raise ValueError(
                        f"{name} is {was[0]} x {was[1]}, others are {size[0]} x {size[1]}; one size a folder"
                    )
                if array.shape != images_read[0][1].shape:
                    raise ValueError(
                        f"{name} comes out as {array.shape}, {names[0].name} as {images_read[0][1].shape}; images of "
                        f"different sizes need a protocol that brings them to one"
                    )
            yield names, torch.from_numpy(np.stack([array for _, array in images_read]))


def _open_and_resize(file: Path, prepare: Preparation, rule: str) -> tuple[tuple[int, int], np.ndarray]:
    """The size of an image and its pixels after both rules."""
    try:
        image = images.read(file)
    except images.UnreadableImage as error:
        raise ValueError(f"{error}; remove or replace it") from None
    try:
        return image.size, resize(prepare(image), rule)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def text_features(prompts: list[str], extractor: Extractor, batch: int = 256) -> Tensor:
    """Prompts -> [N, D] in float64 by the extractor's text encoder, cached. ValueError if it has none."""
    from safetensors.torch import load_file

    from distill.progress import track

    if extractor.text is None:
        raise ValueError(f"extractor {extractor.name} reads no text; choose clip or open_clip")
    key = json.dumps([prompts, extractor.name, extractor.hash])
    path = cache_folder() / "features" / f"text-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.safetensors"
    if not is_complete(path, len(prompts)):
        starts = track(range(0, len(prompts), batch), "batch", f"{extractor.name} prompts")
        embeddings = torch.cat([extractor.text(prompts[i : i + batch]).float() for i in starts])
        _save_tensors(path, {"features": embeddings})
    return load_file(path)["features"].double()


def extract(folder: tuple[Path, ...], extractor: str = "inception-clean", batch: int = 64, workers: int = 4) -> None:
    """Make the features of folders of images. A folder that fails does not stop the others; exit code 1 then.

    Args:
        folder: one or more folders of images.
        extractor: NAME or NAME:WEIGHTS, see eval/features/extractors.py.
        batch: images per call of the network.
        workers: threads that read and resize.
    """
    net = load(extractor)
    failed = []
    for path in folder:
        try:
            features(path, net, batch=batch, workers=workers)
        except ValueError as error:
            failed.append(str(error))
    if failed:
        message = f"{'; '.join(failed)} ({len(folder) - len(failed)} of {len(folder)} folders are done)"
        raise PartialFailure(message) if len(failed) < len(folder) else ValueError(message)


def main() -> None:
    """Command line of `extract`."""
    from eval.cli import run

    run(extract)
