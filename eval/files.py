"""Files of the evaluation stages. A broken file gives one message with its name and the remedy."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill.files import read_text as read_limited_text
from distill.files import write_atomically

LIMIT = 1 << 30  # bytes of a text file: metadata of millions of images have fewer


def read_json(path: Path, remedy: str) -> Any:
    """The value of a JSON file. ValueError, with the remedy, if it is not a regular file, not text or not JSON."""
    text = read_text(path, remedy)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from None


def read_text(path: Path, remedy: str) -> str:
    """A text file without its byte-order mark. ValueError if it is not a regular file or not UTF-8."""
    if not path.exists():
        raise ValueError(f"there is no file {path}; {remedy}")
    try:
        return read_limited_text(path, LIMIT)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None


def images_hash(files: Iterable[Path]) -> str:
    """16 hex digits of BLAKE2b over the contents of the files in their order."""
    total = hashlib.blake2b(digest_size=8)
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "blake2b").digest())
    return total.hexdigest()


def list_names(name: str, known: Iterable[str]) -> str:
    """For a message on an unknown name: the nearest known name, if one is near, and all names."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1, 0.4)
    return f"{f'the nearest is {near[0]}; ' if near else ''}there are {', '.join(names)}"


def shorten(value: object) -> str:
    """A value for a message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_output(path: Path, flag: str, folder: bool = False) -> None:
    """ValueError if `path` cannot be written as a file, or as a folder."""
    kind = "folder" if folder else "file"
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        hint = f", such as {path / 'out.json'}" if path.is_dir() else ""
        raise ValueError(f"{flag} is {path}, which is {_kind_of(path)}; name a {kind}{hint}")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"{flag} is {path}, but {parent} is a file; name a {kind} inside a folder")
    target = path if path.is_dir() else parent
    if not os.access(target, os.W_OK):
        raise ValueError(f"{flag} is {path}, but {target} cannot be written; make it writable, or choose another place")


def _kind_of(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "a file" if path.is_file() else "not a regular file"


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")
