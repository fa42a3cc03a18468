"""Captioned images in a folder: metadata as `datasets` reads them, or a text file beside each image."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from distill.data import images, tables

METADATA = tuple(f"metadata{suffix}" for suffix in tables.TABLES if suffix != ".txt")
BESIDE = (".txt", ".caption")  # the first one counts
NAMED = 3  # files that a message names

Row = tuple[str, str | None, Callable[[], object]]  # name, caption, how to read the image


def rows(folder: Path, paths: list[str], column: str | None, skip: bool, notes: list[str]) -> Iterator[Row]:
    """The images among the files `paths` of a folder, in their order. `notes` receives a line on each kind of skipped
    file.

    skip: rows of metadata without their image are counted; else they are an error.
    """
    root = "" if str(folder) == "." else os.path.join(folder, "")
    names = [path[len(root) :] for path in paths]
    captions_of = captions(root, names, column, skip, notes)
    suffixes = [os.path.splitext(name)[1] for name in names]
    beside = {
        name[: -len(suffix)] + suffix.lower(): path
        for name, suffix, path in zip(names, suffixes, paths, strict=True)
        if suffix.lower() in BESIDE
    }
    if unread := images.describe_unread(paths):
        notes.append(f"{folder}: {unread}")
    for name, suffix, path in zip(names, suffixes, paths, strict=True):
        if images.is_image(path):
            text = captions_of.get(name)
            stem = name[: -len(suffix)]
            file = next((beside[stem + kind] for kind in BESIDE if stem + kind in beside), None)
            if text is None and file is not None:
                text = tables.caption(tables.text_of(file).strip(), file)
            yield path, text, partial(str, path)


def captions(root: str, names: list[str], column: str | None, skip: bool, notes: list[str]) -> dict[str, str | None]:
    """{name of an image: its caption} from the metadata among the files `names`, which are relative to `root`.

    The metadata in the deepest folder count. ValueError for two metadata files in one folder.
    """
    metadata = [name for name in names if os.path.basename(name).lower() in METADATA]
    counts = Counter(map(os.path.dirname, metadata))
    if several := [name for name in metadata if counts[os.path.dirname(name)] > 1]:
        raise ValueError(f"{root}{several[0]} and {root}{several[1]} are in one folder: keep one of them")
    existing = {*names}
    missing: list[str] = []
    targets: dict[str, str] = {}
    all_captions: dict[str, str | None] = {}
    for name in sorted(metadata, key=lambda name: name.count(os.sep)):
        of_file: dict[str, list[str | None]] = {}
        for where, file, text in _metadata_rows(root + name, column):
            path = _resolve_name(root, os.path.dirname(name), file, existing)
            if path not in existing and os.path.exists(root + path):  # read through a link to its folder
                targets = targets or {os.path.realpath(root + other): other for other in names}
                path = targets.get(os.path.realpath(root + path), path)
            if path in existing:
                of_file.setdefault(path, []).append(text)
            else:
                missing.append(f"{where} names {file!r}")
        all_captions |= {path: tables.caption(texts, path) for path, texts in of_file.items()}
    if missing:
        notes += _describe_missing(missing, skip)
    return all_captions


def _metadata_rows(path: str, column: str | None) -> Iterator[tuple[str, str, str | None]]:
    """(where, file name, caption) of each row of metadata."""
    for where, row in tables.rows(Path(path), ("file_name", *([column] if column else tables.COLUMNS))):
        file = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(row, dict) or not isinstance(file, str):
            columns = sorted(map(str, row)) if isinstance(row, dict) else "a string"
            raise ValueError(f"{where} has no file_name, the path of an image; it has {columns}: rename its column")
        yield where, file, tables.caption(row[tables.column(row, column, where)], where)


def _resolve_name(root: str, folder: str, file: str, existing: set[str]) -> str:
    """The name below `root` of a file that metadata in `folder` name, also with ./, backslashes or split accents."""
    if os.path.isabs(file):
        file = os.path.relpath(file, os.path.join(root, folder) or ".")
    name = os.path.normpath(os.path.join(folder, file))
    if "\\" in file and name not in existing:
        name = os.path.normpath(name.replace("\\", "/"))
    forms = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))  # macOS stores NFD
    return next((form for form in forms if form in existing), name)


def _describe_missing(missing: list[str], skip: bool) -> list[str]:
    """A note on rows of metadata without their image. ValueError unless they are skipped."""
    more = f", and {len(missing) - NAMED:,} more rows do so" if len(missing) > NAMED else ""
    listed = f"{'; '.join(missing[:NAMED])}: the folder holds no such visible file{more}"
    if skip:
        return [f"{len(missing):,} row{'s' * (len(missing) > 1)} of metadata skipped: {listed}"]
    raise ValueError(
        f"{listed}. Correct file_name, which is relative to the folder of the metadata, remove the row, or pass "
        "--skip_incomplete (--data.skip_incomplete in training)"
    )
