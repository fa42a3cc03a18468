"""The integrity of a checkpoint: its state.json, and the size and BLAKE2b of every file."""

from __future__ import annotations

import hashlib
import re
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from distill.files import read_json
from distill.ranges import MOST
from distill.training.checkpoint.tensors import TensorReader

FILE = re.compile(r"[A-Za-z]\w*(/[A-Za-z][\w-]*)?\.safetensors")  # student, student/shard-00001-of-2


def list_intact_checkpoints(output_dir: Path) -> list[Path]:
    """The intact checkpoints of a run, oldest first. Corrupt ones are named on stderr, once each.

    Every byte of the last checkpoint is read; of earlier ones only the sizes of files are checked.
    """
    whole: list[Path] = []
    for folder in reversed(checkpoint_folders(output_dir)):
        if why := find_corruption(folder, deep=not whole):
            warn_skipped(folder, why)
        else:
            whole.insert(0, folder)
    return whole


def find_corruption(folder: Path, deep: bool = True) -> str | None:
    """A description of what is corrupt in a checkpoint, with the file; None if it is intact. deep: check the bytes, not
    only sizes.

    A checkpoint without checksums, of an earlier version, is intact if its files can be opened.
    """
    try:
        facts = read_state_file(folder)
    except ValueError as error:
        return str(error)
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if named and int(named[1]) != facts["step"]:
        return f"{folder} was renamed: it holds step {facts['step']}, so call it checkpoint-{facts['step']} again"
    written = {folder / name: (size, digest) for name, (size, digest) in facts.get("files", {}).items()}
    try:
        if not written:
            for file in sorted(folder.glob("*.safetensors")):
                TensorReader(file)
        return _find_changed_file(written, deep)
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    except ValueError as error:  # raised by TensorReader
        return str(error)


def _find_changed_file(written: dict[Path, tuple[int, str]], deep: bool) -> str | None:
    """The first file whose size or, with `deep`, digest differs from the stored one; None if all agree."""
    for file, (size, _) in written.items():
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{file} is not a regular file"
        if status.st_size != size:
            return f"{file} is truncated: it has {status.st_size} of {size} bytes"
    for file, digest in digests([*written] if deep else []):
        if digest != written[file][1]:
            return f"{file} is corrupted: its bytes are not those that were written"
    return None


@cache
def warn_skipped(folder: Path, why: str) -> None:
    sys.stderr.write(f"{folder} is skipped: {why}\n")


def read_step(folder: Path) -> int:
    """Number of finished iterations in a checkpoint. ValueError if its state.json is damaged."""
    return read_state_file(folder)["step"]


def read_state_file(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint: step, skipped, files. ValueError if it is damaged."""
    path = folder / "state.json"
    try:
        facts = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is missing or damaged ({error})") from None
    wrong = _state_error(facts)
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong}")
    return facts


def _state_error(facts: Any) -> str | None:
    """A description of the first invalid entry of a state.json; None if all are valid."""
    if not isinstance(facts, dict):
        return "it is not a JSON object"
    step = facts.get("step")
    skipped = facts.get("skipped", {})
    files = facts.get("files", {})
    if type(step) is not int or not 0 <= step <= MOST:
        return f"its step is {step!r}"
    counts = isinstance(skipped, dict) and all(type(n) is int and 0 <= n <= MOST for n in skipped.values())
    if not counts:
        return f"its skipped is {skipped!r}"
    if not isinstance(files, dict):
        return f"its files are {files!r}"
    for name, entry in files.items():
        pair = isinstance(entry, list) and [type(part) for part in entry] == [int, str]
        if not pair or not FILE.fullmatch(name):
            return f"it lists the file {name!r} as {entry!r}"
    return None


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Folders with the name of a checkpoint, oldest first, including links to folders."""
    folders = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in folders if p.is_dir() or p.is_symlink()), key=step_of_name)


def step_of_name(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def digests(files: list[Path]) -> Iterator[tuple[Path, str]]:
    """(file, BLAKE2b of its bytes), computed in parallel. An unchanged file is read once per process."""
    stats = [file.stat() for file in files]
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(digest, files, [(s.st_ino, s.st_size, s.st_mtime_ns) for s in stats])
        yield from zip(files, digests, strict=True)


@cache
def digest(file: Path, stamp: tuple[int, int, int]) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
