"""Prompts and captioned images as users keep them: text files, tables, folders, tar shards, `datasets`."""

from __future__ import annotations

import importlib.util
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.data import images
from distill.data.images import Broken as Broken

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("text", "caption", "prompt")  # looked for, in this order, where no column is named
TABLES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Pictures:
    """Images with captions, read one by one, each by its number."""

    names: list[str]  # what an error calls them
    captions: list[str]
    read: Callable[[int], Any]  # -> a file's path, its bytes or a PIL image

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Image:
        """Image i in RGB, upright; Broken if it cannot be decoded."""
        return images.read(self.read(i), self.names[i]).convert("RGB")


def check(source: str) -> None:
    """ValueError if prompts or images are plainly not there; opens nothing."""
    path = Path(source)
    if source.endswith(".tar"):
        shards = _expand(source)
        if missing := [str(shard) for shard in shards if not shard.is_file()] or ([] if shards else [source]):
            raise ValueError(f"no tar at {missing[0]!r}; give local shards, such as 'shards/{{000..127}}.tar'")
    elif path.is_dir():
        return
    elif path.suffix in TABLES:
        if not path.is_file():
            raise ValueError(f"no prompts at {source!r}: it is not a file")
        if not path.stat().st_size:
            raise ValueError(f"{source} is empty; it needs one prompt a line")
        if path.suffix == ".parquet":
            _require("pyarrow", source)
    elif path.is_file() or "://" in source or path.is_absolute() or source.startswith("."):
        raise ValueError(
            f"{source!r} is not something to read: give a file ({', '.join(TABLES)}), a folder, local .tar shards, or "
            "the name of a dataset on the Hub"
        )
    else:
        _require("datasets", source)


def prompts(source: str, column: str | None = None, limit: int | None = None) -> list[str]:
    """The prompts of a .txt (one a line), .jsonl or .parquet file, or of a dataset's `train` split.

    column: of a table, by default the first of COLUMNS that it has. limit: the first so many.
    """
    check(source)
    path = Path(source)
    if path.suffix == ".txt":
        found: Any = (line.strip() for line in _text(path).split("\n"))
    elif path.suffix == ".jsonl":
        found = (row if isinstance(row, str) else row[_column(row, column, source)] for row in _jsonl(path))
    elif path.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.ParquetFile(path)
        name = _column(table.schema_arrow.names, column, source)
        found = (text for rows in table.iter_batches(columns=[name]) for text in rows.column(0).to_pylist())
    else:
        rows = _dataset(source)
        found = rows[_column(rows.column_names, column, source)]
    texts = list(islice((text for text in found if text not in (None, "")), limit))
    if not texts:
        raise ValueError(f"{source} holds no prompts")
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{source}: prompts are text, and {wrong[0]!r} is not")
    return texts


def pictures(source: str, image: str = "image", column: str | None = None, limit: int | None = None) -> Pictures:
    """Images with their captions, from a folder, tar shards or a dataset.

    A folder's captions are in its metadata.jsonl ("file_name" and a text column) or in a .txt file beside each image.
    A sample of a tar is its files of one name, webdataset's convention: an image and .txt, or .json with a column.
    """
    check(source)
    if source.endswith(".tar"):
        found = _tars(_expand(source), column)
    elif Path(source).is_dir() and not (Path(source) / "state.json").is_file():
        found = _folder(Path(source), column)
    else:
        found = _rows(_dataset(source), source, image, column)
    rows = list(islice(found, limit))
    if not rows:
        raise ValueError(f"{source} holds no images")
    names, captions, reads = ([*part] for part in zip(*rows, strict=True))
    if None in captions:
        first = names[captions.index(None)]
        raise ValueError(
            f"image {first} has no caption: put it into a .txt file of the same name, or into metadata.jsonl"
        )
    return Pictures(names, captions, lambda i: reads[i]())


Row = tuple[str, str | None, Callable[[], Any]]  # name, caption, how to read the image


def _folder(folder: Path, column: str | None) -> Iterator[Row]:
    told, metadata = {}, folder / "metadata.jsonl"
    if metadata.is_file():
        rows = list(_jsonl(metadata))
        told = {row.get("file_name"): row[_column(row, column, str(metadata))] for row in rows}
    for path in sorted(p for p in folder.rglob("*") if images.is_image(p)):
        beside = path.with_suffix(".txt")
        text = told.get(path.relative_to(folder).as_posix())
        if text is None and beside.is_file():
            text = _text(beside).strip()
        yield str(path), text, lambda path=path: path


def _tars(shards: list[Path], column: str | None) -> Iterator[Row]:
    """Where each image lies in the tars; the images themselves stay there."""

    def read(shard: Path, offset: int, size: int) -> Any:
        with shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    for shard in shards:
        samples: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    sample = samples.setdefault(f"{folder}/{stem}", {})
                    if f".{suffix.lower()}" in images.suffixes():
                        sample["image"] = member.name, member.offset_data, member.size
                    elif suffix in ("txt", "json"):
                        sample[suffix] = tar.extractfile(member).read().decode()
        except (tarfile.TarError, UnicodeDecodeError) as error:
            raise ValueError(f"{shard} is not a whole, uncompressed tar: {error}") from None
        for sample in samples.values():
            if "image" in sample:
                name, offset, size = sample["image"]
                text = sample.get("txt", "").strip() or None
                if text is None and "json" in sample:
                    row = json.loads(sample["json"])
                    text = row[_column(row, column, f"{shard}:{name}")]
                yield f"{shard}:{name}", text, partial(read, shard, offset, size)


def _rows(rows: Any, source: str, image: str, column: str | None) -> Iterator[Row]:
    name = _column(rows.column_names, column, source)
    if image not in rows.column_names:
        raise ValueError(f"{source} has no column {image!r} of images; it has {sorted(rows.column_names)}")
    read = lambda i: rows[i][image]
    for i, text in enumerate(rows[name]):
        yield f"{source}[{i}]", text, partial(read, i)


def _dataset(source: str) -> Any:
    """The train split of a dataset: saved by save_to_disk, a folder that `datasets` reads, or a name on the Hub."""
    _require("datasets", source)
    import datasets

    try:
        saved = (Path(source) / "state.json").is_file()
        return datasets.load_from_disk(source) if saved else datasets.load_dataset(source, split="train")
    except (OSError, ValueError) as error:  # not found, offline, no such split
        raise ValueError(f"{source!r} cannot be read as a dataset: {error}") from None


def _require(library: str, source: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ValueError(f"{source!r} is read by {library}, which is missing: pip install 'distill-one-step[data]'")


def _column(names: Any, column: str | None, source: str) -> str:
    for name in [column] if column else COLUMNS:
        if name in names:
            return name
    wanted = repr(column) if column else f"called {', '.join(COLUMNS)}"
    raise ValueError(f"{source} has no column {wanted}; it has {sorted(names)}: name its column of text")


def _jsonl(path: Path) -> Iterator[Any]:
    for i, line in enumerate(_text(path).split("\n")):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {i + 1}, is no JSON: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None


def _expand(pattern: str) -> list[Path]:
    """Files of a pattern: 'a/{00..12}.tar' as webdataset writes it, or 'a/*.tar'."""
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        low, high = span.groups()
        numbers = (f"{i:0{len(low)}}" for i in range(int(low), int(high) + 1))
        return [path for n in numbers for path in _expand(pattern[: span.start()] + n + pattern[span.end() :])]
    path = Path(pattern)
    return sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
