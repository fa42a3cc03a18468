"""Prompts and captioned images from text files, tables, folders, tar shards and `datasets`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.data import folders, images, tables, tars
from distill.data.folders import Row
from distill.data.images import UnreadableImage as UnreadableImage
from distill.data.tables import TABLES, caption

if TYPE_CHECKING:
    from PIL.Image import Image

SAVED = ("state.json", "dataset_dict.json")  # files that save_to_disk of `datasets` writes


@dataclass(frozen=True)
class Pictures:
    """Images with captions. Image i is read on access."""

    names: list[str]  # what an error calls them
    captions: list[str]
    read: Callable[[int], object]  # -> a file's path, its bytes, a PIL image or {"bytes", "path"}
    notes: tuple[str, ...] = ()  # skipped files

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Image:
        """Image i in RGB, upright; UnreadableImage if it cannot be decoded."""
        try:
            content = self.read(i)
        except Exception as error:  # of any reader of tables
            raise UnreadableImage(f"image {self.names[i]} cannot be read: {error}") from None
        if isinstance(content, dict):
            content = content.get("bytes") or content.get("path")
        if not content:
            raise UnreadableImage(f"image {self.names[i]} cannot be read: its cell is empty")
        return images.read(content, self.names[i]).convert("RGB")


def validate_source(source: str) -> None:
    """ValueError if a source of prompts or images does not exist. Opens no file."""
    path = Path(source)
    suffix = Path(source).suffix.lower()
    if suffix == ".tar":
        _validate_shards(source)
    elif path.is_dir():
        return
    elif suffix in TABLES:
        if not path.is_file():
            raise ValueError(f"no prompts at {source!r}: it is not a file")
        if not path.stat().st_size:
            raise ValueError(f"{source} is empty; it needs one prompt a line")
        if suffix == ".parquet":
            _require("pyarrow", source)
    elif path.exists() or "://" in source or path.is_absolute() or source.startswith("."):
        raise ValueError(
            f"{source!r} is not something to read: give a file ({', '.join(TABLES)}), a folder, local .tar shards, or "
            "the name of a dataset on the Hub"
        )
    else:
        _require("datasets", source)


def _validate_shards(source: str) -> None:
    shards = tars.expand(source)
    if missing := [str(shard) for shard in shards if not shard.is_file()] or ([] if shards else [source]):
        raise ValueError(f"no tar at {missing[0]!r}; give local shards, such as 'shards/{{000..127}}.tar'")


def prompts(source: str, column: str | None = None, limit: int | None = None) -> list[str]:
    """The prompts of a table (TABLES; of .txt one a line), or of a dataset's `train` split.

    column: by default the first of COLUMNS that exists. limit: use only so many.
    """
    validate_source(source)
    path = Path(source)
    if path.suffix.lower() == ".tar":
        raise ValueError(f"{source!r} holds images: pass it as --images; without prompts their captions are prompts")
    if path.suffix.lower() in TABLES and not path.is_dir():
        candidates = tables.texts(path, column)
    else:
        rows = _dataset(source)
        cells = rows[tables.column(rows.column_names, column, source)]
        candidates = (caption(cell, f"{source}, row {i}") for i, cell in enumerate(cells, 1))
    texts = list(islice((text for text in candidates if text and not text.isspace()), limit))
    if not texts:
        raise ValueError(f"{source} holds no prompts")
    return texts


def pictures(source: str, image: str = "image", column: str | None = None, limit: int | None = None) -> Pictures:
    """Images with their captions, from a folder, tar shards or a dataset.

    A folder's captions are in its metadata, a table of file_name and text, or in a .txt or .caption file beside each
    image. A sample of a tar is its files of one name, webdataset's convention: an image and .txt, or .json with a
    column. Of several captions of an image one is drawn, always the same.
    """
    validate_source(source)
    notes: list[str] = []
    path = Path(source)
    files = images.files(path) if path.is_dir() else []
    if source.lower().endswith(".tar"):
        samples = tars.rows(tars.expand(source), column, notes)
    elif files and not _is_dataset(path, files):
        samples = folders.rows(path, files, column, notes)
    elif path.is_file() or (path.is_dir() and not files):
        raise ValueError(f"{source!r} holds no images: give a folder, local .tar shards or the name of a dataset")
    else:
        samples = _rows(_dataset(source), source, image, column)
    rows = list(islice(samples, limit))
    if not rows:
        raise ValueError(f"{source} holds no images. {' '.join(notes)}".rstrip())
    names, captions, reads = ([*part] for part in zip(*rows, strict=True))
    if None in captions:
        first = names[captions.index(None)]
        raise ValueError(
            f"image {first} has no caption: put it into a .txt or .caption file of the same name, or into "
            "metadata.jsonl or metadata.csv with file_name and text"
        )
    return Pictures(names, captions, lambda i: reads[i](), tuple(notes))


def notice(lines: tuple[str, ...] | list[str]) -> None:
    """Write lines to stderr, in the first process only."""
    from torch import distributed

    if lines and not (distributed.is_initialized() and distributed.get_rank()):
        sys.stderr.write("".join(f"{line}\n" for line in lines))


def _is_dataset(folder: Path, files: list[Path]) -> bool:
    """Whether a folder is a saved dataset, or holds tables of data and no image."""
    if any((folder / name).is_file() for name in SAVED):
        return True
    tables_of_data = [f for f in files if f.suffix.lower() in (".parquet", ".arrow") and f.stem.lower() != "metadata"]
    return bool(tables_of_data) and not any(map(images.is_image, files))


def _rows(rows: Any, source: str, image: str, column: str | None) -> Iterator[Row]:
    import datasets

    name = tables.column(rows.column_names, column, source)
    if image not in rows.column_names:
        raise ValueError(f"{source} has no column {image!r} of images; it has {sorted(rows.column_names)}")
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))  # images.read decodes
    read = lambda i: rows[i][image]
    for i, text in enumerate(rows[name]):
        where = f"{source}[{i}]"
        yield where, caption(text, where), partial(read, i)


def _dataset(source: str) -> Any:
    """The train split of a dataset: saved by save_to_disk, a folder that `datasets` reads, or a name on the Hub."""
    _require("datasets", source)
    import datasets

    try:
        saved = any((Path(source) / name).is_file() for name in SAVED)
        if not saved:
            return datasets.load_dataset(source, split="train")
        dataset = datasets.load_from_disk(source)
    except Exception as error:  # not found, offline, no such split, damaged
        raise ValueError(f"{source!r} cannot be read as a dataset: {error.__cause__ or error}") from None
    if isinstance(dataset, datasets.DatasetDict):
        splits = sorted(dataset)
        if "train" not in splits and len(splits) != 1:
            raise ValueError(f"{source!r} has the splits {splits}, and none is called train: give the folder of one")
        return dataset["train" if "train" in splits else splits[0]]
    return dataset


def _require(library: str, source: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ValueError(f"{source!r} is read by {library}, which is missing: pip install 'distill-one-step[data]'")
