"""Prompts and captioned images from text files, tables, folders, tar shards and `datasets`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.data import folders, images, patterns, tables, tars
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
    are_files: bool = False  # the names are paths

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

    def validate_headers(self, remedy: str) -> None:
        """ValueError that names image files whose header cannot be read. Images in tars and datasets are not opened."""
        if self.are_files:
            images.validate_headers(self.names, remedy)


@dataclass(frozen=True)
class Source:
    """Where prompts or images are: the files or folders of a name."""

    kind: Literal["tars", "tables", "folders", "dataset"]
    paths: list[Path]


def locate(source: str) -> Source:
    """The kind of a source, and its paths, of a pattern several. ValueError if it does not exist. Opens no file."""
    paths = patterns.expand(source)
    suffixes = {path.suffix.lower() for path in paths} or {Path(source).suffix.lower()}
    folders = [path for path in paths if path.is_dir()]
    has_images = any(images.is_image(path) for path in paths if path not in folders)
    if suffixes == {".tar"}:
        _validate_tars(source, paths)
        return Source("tars", paths)
    if folders and not has_images:
        return Source("folders", folders)
    if suffixes <= {*TABLES}:
        for path in paths or [Path(source)]:
            _validate_table(path)
        return Source("tables", paths)
    if patterns.is_pattern(source):
        raise ValueError(f"the pattern {source!r} fits {_describe_matches(paths)}")
    _validate_dataset_name(source)
    return Source("dataset", paths)


def _validate_tars(source: str, paths: list[Path]) -> None:
    missing = [str(path) for path in paths if not path.is_file()]
    if not paths or missing:
        name = (missing or [source])[0]
        raise ValueError(f"no tar at {name!r}; give local shards, such as 'shards/{{000..127}}.tar'")


def _validate_dataset_name(source: str) -> None:
    path = Path(source)
    if path.exists() or path.is_absolute() or "://" in source or source.startswith("."):
        raise ValueError(
            f"{source!r} is not something to read: give a file ({', '.join(TABLES)}), a folder, local .tar shards, or "
            "the name of a dataset on the Hub"
        )
    _require("datasets", source)


def _validate_table(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"no prompts at {str(path)!r}: it is not a file")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; it needs one prompt a line")
    if path.suffix.lower() == ".parquet":
        _require("pyarrow", str(path))


def _describe_matches(paths: list[Path]) -> str:
    """What a pattern fits that is no source, and the remedy."""
    if not paths:
        return "no file and no folder: correct it"
    kinds = f"a pattern stands for tables ({', '.join(TABLES)}), .tar files or folders"
    if any(map(images.is_image, paths)):
        return f"images, such as {paths[0]}: give their folder, which is read with their captions; {kinds}"
    return f"{images.format_file_count(paths)}, such as {paths[0]}: {kinds}, of one kind"


def prompts(source: str, column: str | None = None, limit: int | None = None) -> list[str]:
    """The prompts of tables (TABLES; of .txt one a line), or of a dataset's `train` split.

    column: by default the first of COLUMNS that exists. limit: use only so many.
    """
    located = locate(source)
    if located.kind == "tars":
        raise ValueError(f"{source!r} holds images: pass it as --images; without prompts their captions are prompts")
    if located.kind == "tables":
        candidates: Iterable[str | None] = chain.from_iterable(tables.texts(path, column) for path in located.paths)
    else:
        rows = _dataset(source)
        cells = rows[tables.column(rows.column_names, column, source)]
        candidates = (caption(cell, f"{source}, row {i}") for i, cell in enumerate(cells, 1))
    texts = [*islice((text for text in candidates if text is not None and text.strip()), limit)]
    if not texts:
        raise ValueError(f"{source} holds no prompts")
    return texts


def pictures(
    source: str, image: str = "image", column: str | None = None, limit: int | None = None, skip: bool = False
) -> Pictures:
    """Images with their captions, from folders, tar shards or a dataset.

    A folder's captions are in its metadata, a table of file_name and text, or in a .txt or .caption file beside each
    image. A sample of a tar is its files of one name, webdataset's convention: an image and .txt, or .json with a
    column. Of several captions of an image one is drawn, always the same.

    skip: leave out images without a caption and rows of metadata without their image; else they are a ValueError.
    """
    notes: list[str] = []
    located = locate(source)
    listed = {path: images.paths(path) for path in located.paths if located.kind == "folders"}
    are_files = bool(listed) and not (len(listed) == 1 and _is_dataset(*next(iter(listed.items()))))
    if located.kind == "tars":
        samples = tars.rows(located.paths, column, notes)
    elif are_files:
        samples = chain.from_iterable(folders.rows(path, files, column, skip, notes) for path, files in listed.items())
    elif located.kind == "tables":
        raise ValueError(f"{source!r} holds no images: give a folder, local .tar shards or the name of a dataset")
    else:
        samples = _rows(_dataset(source), source, image, column)
    uncaptioned: list[str] = []
    rows = list(islice(_select_captioned(samples, uncaptioned, skip), limit))
    if uncaptioned and not skip:
        raise ValueError(_describe_uncaptioned(uncaptioned))
    if uncaptioned:
        several = "s" * (len(uncaptioned) > 1)
        notes.append(f"{len(uncaptioned):,} image{several} without a caption skipped: {_first_names(uncaptioned)}")
    if not rows:
        raise ValueError(f"{source} holds no images. {' '.join(notes)}".rstrip())
    names, captions, reads = ([*part] for part in zip(*rows, strict=True))
    return Pictures(names, captions, lambda i: reads[i](), tuple(notes), are_files)


def _select_captioned(rows: Iterable[Row], uncaptioned: list[str], skip: bool) -> Iterator[Row]:
    """The rows with a caption, and the others unless they are skipped; `uncaptioned` receives the names of those."""
    for row in rows:
        blank = not (row[1] or "").strip()
        if blank:
            uncaptioned.append(row[0] if row[1] is None else f"{row[0]} (its text is empty)")
        if not (blank and skip):
            yield row


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - folders.NAMED:,} more" if len(names) > folders.NAMED else ""
    return ", ".join(names[: folders.NAMED]) + more


def _describe_uncaptioned(names: list[str]) -> str:
    have = "has" if len(names) == 1 else "have"
    return (
        f"image{'s' * (len(names) > 1)} {_first_names(names)} {have} no caption: put it into a .txt or .caption file "
        "of the same name, or into metadata.jsonl or metadata.csv with file_name and text, or pass --skip_incomplete "
        "(--data.skip_incomplete in training) to leave such images out"
    )


def notice(lines: tuple[str, ...] | list[str]) -> None:
    """Write lines to stderr, in the first process of a launcher only."""
    if lines and os.environ.get("RANK", "0") == "0":
        sys.stderr.write("".join(f"{line}\n" for line in lines))


def _is_dataset(folder: Path, paths: list[str]) -> bool:
    """Whether a folder is a saved dataset, or holds tables of data and no image."""
    if any((folder / name).is_file() for name in SAVED):
        return True
    parts = [os.path.splitext(os.path.basename(path)) for path in paths]
    has_tables = any(suffix.lower() in (".parquet", ".arrow") and stem.lower() != "metadata" for stem, suffix in parts)
    return has_tables and not any(map(images.is_image, paths))


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
