"""Captioned images in local tar shards, as webdataset lays them out. The images stay in the tars."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from distill.data import images, tables

LISTED = 3  # members that a note names
LONGEST = 2**20  # bytes of a caption's file

Row = tuple[str, str | None, Callable[[], object]]  # name, caption, how to read the image


def rows(shards: list[Path], column: str | None, notes: list[str]) -> Iterator[Row]:
    """The images in the tars. Appends a line to `notes` for each kind of skipped member."""
    for shard in shards:
        samples: dict[str, dict[str, Any]] = {}
        unread: list[Path] = []
        links: list[str] = []
        for member, content in _members(shard):
            path = PurePosixPath(member.name)
            if any(images.is_hidden(part) for part in path.parts if part not in (".", "..")):
                continue
            if not member.isfile():
                links.append(member.name)
                continue
            stem, _, suffix = path.name.partition(".")
            suffix = suffix.lower()
            sample = samples.setdefault(f"{path.parent}/{stem}", {})
            if f".{suffix}" in images.suffixes():
                sample["image"] = member.name, member.offset_data, member.size
            elif content is not None:
                sample["txt" if suffix == "caption" else suffix] = content
            else:
                unread.append(Path(path.name))
        if others := images.describe_unread(unread):
            notes.append(f"{shard}: {others}")
        if links:
            notes.append(
                f"{shard}: {images.format_file_count(links)} skipped, links to others: {', '.join(links[:LISTED])}"
            )
        for sample in samples.values():
            if "image" in sample:
                name, offset, size = sample["image"]
                where = f"{shard}:{name}"
                yield where, _caption(sample, column, where), partial(_read, shard, offset, size)


def _caption(sample: dict[str, Any], column: str | None, where: str) -> str | None:
    text = tables.caption(sample.get("txt", "").strip(), where) or None
    if text is None and "json" in sample:
        row = tables.loads(sample["json"], f"{where}, its .json")
        if not isinstance(row, dict):
            raise ValueError(f'{where}: its .json holds no object, such as {{"text": "a red fox"}}')
        text = tables.caption(row[tables.column(row, column, where)], where)
    return text


def _members(shard: Path) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    """The files and links of a tar, with the text of .txt, .caption and .json files."""
    length = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            last = -1
            for member in tar:
                if member.issparse():
                    raise ValueError(f"its member {member.name} is sparse: write it with plain `tar`, without --sparse")
                end = member.offset_data + member.size * member.isfile()
                if member.offset <= last or end > length:
                    raise ValueError(f"its member {member.name} goes beyond its end: copy it anew")
                last = member.offset
                if not member.isdir():
                    yield member, _text(tar, member) if member.isfile() else None
            with shard.open("rb") as file:
                file.seek(tar.offset)
                if any(file.read(tarfile.BLOCKSIZE)):
                    raise ValueError(f"no file begins at byte {tar.offset:,}: copy it anew")
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise ValueError(f"{shard} is not a complete, uncompressed tar: {error}") from None


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    if PurePosixPath(member.name).suffix.lower() not in (".txt", ".caption", ".json"):
        return None
    if member.size > LONGEST:
        raise ValueError(f"its member {member.name} has {member.size:,} bytes, too many for a caption")
    file = tar.extractfile(member)
    assert file is not None
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its member {member.name} is not text in UTF-8: {error}") from None


def _read(shard: Path, offset: int, size: int) -> bytes:
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)
