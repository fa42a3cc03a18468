"""Captioned images in a folder: metadata as `datasets` reads them, or a text file beside each image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from distill.data import images, tables

METADATA = tuple(f"metadata{suffix}" for suffix in tables.TABLES if suffix != ".txt")
BESIDE = (".txt", ".caption")  # the first one counts
NAMED = 3  # files that a note names

Row = tuple[str, str | None, Callable[[], object]]  # name, caption, how to read the image


def rows(folder: Path, files: list[Path], column: str | None, notes: list[str]) -> Iterator[Row]:
    """The images among the files of a folder. Appends a line to `notes` for each kind of skipped file."""
    pictures = [path for path in files if images.is_image(path)]
    captions_of, metadata = captions(files, column)
    beside = {(path.parent, path.stem, path.suffix.lower()): path for path in files if path.suffix.lower() in BESIDE}
    if unread := images.describe_unread(files):
        notes.append(f"{folder}: {unread}")
    existing = {os.path.normpath(path) for path in files}
    if gone := [name for name in captions_of if name not in existing]:
        names = ", ".join(gone[:NAMED]) + ", ..." * (len(gone) > NAMED)
        notes.append(f"{metadata[0]} names {images.format_file_count(gone)} that cannot be found: {names}")
    for path in pictures:
        text = captions_of.get(os.path.normpath(path))
        texts = [file for suffix in BESIDE if (file := beside.get((path.parent, path.stem, suffix)))]
        if text is None and texts:
            text = tables.caption(tables.text_of(texts[0]).strip(), str(texts[0]))
        yield str(path), text, partial(Path, path)


def captions(files: list[Path], column: str | None) -> tuple[dict[str, str | None], list[Path]]:
    """({path of an image: its caption}, the metadata files). The file in the deepest folder counts."""
    metadata = [path for path in files if path.name.lower() in METADATA]
    all_captions: dict[str, str | None] = {}
    for path in sorted(metadata, key=lambda path: len(path.parts)):
        of_file: dict[str, list[str | None]] = {}
        for where, row in tables.rows(path, ("file_name", *([column] if column else tables.COLUMNS))):
            name = row.get("file_name") if isinstance(row, dict) else None
            if not isinstance(row, dict) or not isinstance(name, str):
                names = sorted(map(str, row)) if isinstance(row, dict) else "a string"
                raise ValueError(f"{where} has no file_name, the path of an image; it has {names}")
            text = tables.caption(row[tables.column(row, column, where)], where)
            of_file.setdefault(_resolve_path(path.parent, name), []).append(text)
        all_captions |= {name: tables.caption(several, name) for name, several in of_file.items()}
    return all_captions, metadata


def _resolve_path(folder: Path, name: str) -> str:
    """The path of a file that metadata in `folder` name, also with backslashes."""
    path = os.path.normpath(os.path.join(folder, name))
    return path if "\\" not in name or os.path.exists(path) else _resolve_path(folder, name.replace("\\", "/"))
