"""The shards and the index of a cache: which of them are missing, how they are written, and how a cache is finished.

Each shard is complete or absent, so that an interrupted command continues, and processes share the shards.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, TypeVar, cast

import torch
import tyro

from distill.configuration import fail
from distill.data.index import INDEX, TEXTS, read_unfinished_index
from distill.data.shards import Rows, Table, file, is_readable, narrow, note, pack, save
from distill.data.sources import UnreadableImage
from distill.files import LOCK, write_atomically
from distill.layout import program_name
from distill.training.checkpoint import describe_disk_error

if TYPE_CHECKING:
    from accelerate import Accelerator

LARGE = 10**12  # bytes of a cache that deserve a second thought
SAMPLE = 8  # texts to encode for an estimate of the bytes per text
Precision = Literal["float16", "bfloat16", "float32"]
C = TypeVar("C")


class TableEntry(TypedDict):
    """A table in the index. total: rows. bytes: of one row. shapes: of a row's tensors. rows: of each shard."""

    total: int
    bytes: float
    per_shard: int
    shapes: dict[str, list[int]]
    rows: NotRequired[list[int]]


class Index(TypedDict):
    """index.json of a cache: what it was made from, and its tables."""

    teacher: dict[str, str]
    shape: list[int]
    dtype: str
    prompts: int
    sources: str
    precision: NotRequired[str]
    crops: NotRequired[int]
    squeeze: NotRequired[bool]
    ode: NotRequired[dict[str, object]]
    versions: NotRequired[dict[str, str]]
    tables: NotRequired[dict[str, TableEntry]]


@dataclass(frozen=True)
class Writing:
    """How the rows of a table are written."""

    batch_size: int  # rows that are encoded at once
    dtype: Precision  # of the stored tensors
    shard_bytes: int = 10**9  # approximate size of a file
    skip_broken: bool = False  # leave unreadable images out, and list them


def run_command(kind: type[C], run: Callable[[C], object], doc: str | None, argv: list[str] | None) -> None:
    """Parse the command line into a `kind` and run it. Every mistake of the user ends in one message."""
    try:
        run(tyro.cli(kind, args=argv, description=doc, use_underscores=True, prog=program_name()))
    except (ValueError, OSError) as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not (why := describe_disk_error(error)):
            raise
        fail(f"{why}, and give the same command again: it goes on")
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: the shards that are written stay; the same command goes on\n")
        raise SystemExit(130) from None


def resume(folder: Path, index: Index) -> Index | None:
    """The index in the folder; None if there is none. ValueError if its configuration differs from that of `index`."""
    if (folder / INDEX).is_file():
        old = cast(Index, read_unfinished_index(folder))
        changed = [key for key, value in index.items() if old.get(key) != value]
        if changed:
            raise ValueError(
                f"{folder} holds a cache of other {', '.join(changed)}: choose another --output_dir, or remove it"
            )
        announce(folder, old)
        return old
    # files of a command that was killed while it wrote them, and of this command
    ours = {TEXTS, LOCK, *(path.name for name in (TEXTS, INDEX) for path in folder.glob(f".{name}.*partial"))}
    if folder.exists() and {path.name for path in folder.iterdir()} - ours:
        raise ValueError(f"{folder} is not empty and holds no cache: choose another --output_dir")
    return None


def start_cache(folder: Path, index: Index, texts: Sequence[str]) -> Index:
    """Write the first files of a cache, and return the index with the versions of the libraries."""
    libraries = ("distill-one-step", "torch", "diffusers", "transformers")
    index["versions"] = {name: version(name) for name in libraries}
    announce(folder, index)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TEXTS, "".join(f"{json.dumps(text)}\n" for text in texts))
    write_atomically(folder / INDEX, json.dumps(index, indent=1))
    return index


def spread(n: int, k: int) -> list[int]:
    """Up to k of n rows, evenly spaced."""
    return sorted({i * n // k for i in range(k)})


def table_entry(writing: Writing, total: int, rows: Rows) -> TableEntry:
    """The shards of a table with `total` rows that have the average size of `rows`."""
    stored = pack(narrow(rows, getattr(torch, writing.dtype)))
    each = sum(t.nbytes for t in stored.values()) / len(next(iter(rows.values())))
    shapes = {key: list(value.shape[1:]) for key, value in rows.items()}
    return {
        "total": total,
        "bytes": each,
        "per_shard": max(1, min(total, int(writing.shard_bytes / each))),
        "shapes": shapes,
    }


def image_entry(writing: Writing, total: int, shape: Sequence[int], crops: bool = False) -> TableEntry:
    """The shards of a table of `total` latents of this shape, with their captions' numbers and the sizes of crops."""
    row: Rows = {"x": torch.ones(1, *shape), "caption": torch.zeros(1, dtype=torch.int64)}
    return table_entry(writing, total, row | ({"time_ids": torch.zeros(1, 6)} if crops else {}))


def announce(folder: Path, index: Index) -> None:
    """Print the bytes of the cache, a row and in total, and the disk's free bytes. ValueError if they do not fit."""
    need = 0.0
    lines = []
    for name, entry in index["tables"].items():
        shards = -(-entry["total"] // entry["per_shard"])
        whole = sum(is_readable(folder / file(name, i)) for i in range(shards))
        left = max(0, entry["total"] - whole * entry["per_shard"]) * entry["bytes"]
        need += left
        lines.append(
            f"{name}: {entry['total']:,} x {entry['bytes']:,.0f} bytes = {human(entry['total'] * entry['bytes'])}"
        )
        lines[-1] += f" in {shards} shard{'s' * (shards > 1)}" + f", {whole} of them written" * bool(whole)
    near = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(near).free
    lines.append(f"{human(need)} to write; the disk of {near} has {human(free)} free")
    if LARGE < need <= free:
        lines.append(f"this is a lot: {smaller(index, 1.0)}")
    sys.stderr.write("\n".join(lines) + "\n")
    if need > free:
        raise ValueError(
            f"the cache needs {human(need)} more and the disk of {near} has {human(free)} free: choose another "
            f"--output_dir, or {smaller(index, free / need)}"
        )


def smaller(index: Index, part: float) -> str:
    """What makes a cache smaller. part: the fraction of its bytes that fits on the disk."""
    pairs = "ode" in index
    ways = ["fewer pairs" if pairs else "fewer prompts"]
    most = most_samples(index, part)
    if part < 1 and most > 0:
        ways[0] += f" ({'--n' if pairs else '--max_samples'} {most} fits)"
    if index["dtype"] == "float32":
        ways.append("--dtype bfloat16, half the bytes")
    if index.get("crops", 0) > 1:
        ways.append("fewer --crops")
    if not pairs:
        ways.append("no cache: encode while training (--data.text online)")
    return ", or ".join(ways)


def most_samples(index: Index, part: float) -> int:
    """A number of pairs, or of prompts and images, whose cache has at most this fraction of the bytes."""
    text = index["tables"]["text"]
    image = index["tables"].get("image")
    if image is None:
        return int(text["total"] * part) - 1  # the last row is the empty text
    if "ode" in index:  # fewer pairs have the same prompts
        size = text["total"] * text["bytes"]
        return int(((size + image["total"] * image["bytes"]) * part - size) / image["bytes"])
    n = min(index["prompts"], image["total"] // max(1, index.get("crops", 0)))
    return int((n + 1) * part) - 1


def human(n: float) -> str:
    """Bytes in a readable form: 159 GB."""
    power = min(4, int(math.log10(max(n, 1))) // 3)
    n /= 1000**power
    return f"{n:.{1 if n < 100 and power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def write_table(folder: Path, name: str, table: Table, entry: TableEntry, writing: Writing, state: Accelerator) -> None:
    """Write the missing shards; each process writes its part of them."""
    from distill.progress import bar

    total = entry["total"]
    per_shard = entry["per_shard"]
    dtype = getattr(torch, writing.dtype)
    mine = range(total)[::per_shard][state.process_index :: state.num_processes]
    rows = {first: range(first, min(first + per_shard, total)) for first in mine}
    missing = [first for first in mine if not is_readable(folder / file(name, first // per_shard))]
    done = sum(len(rows[first]) for first in mine if first not in missing)
    with bar(sum(map(len, rows.values())), "row", name, state.is_main_process, done) as shown:
        for first in missing:
            parts: list[Rows] = []
            broken: list[str] | None = [] if writing.skip_broken else None
            for batch in split_rows(rows[first], writing.batch_size):
                parts += [narrow(part, dtype) for part in read_valid_rows(table, batch, broken)]
                shown.update(len(batch))
            write_shard(folder / file(name, first // per_shard), parts, broken or [], entry)


def split_rows(rows: range, size: int) -> list[range]:
    """The rows in batches."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def write_shard(path: Path, parts: list[Rows], broken: list[str], entry: TableEntry) -> None:
    """Write one shard of the rows in `parts`, and the messages of the `broken` ones. OSError says how to go on."""
    empty = {key: torch.zeros(0, *shape) for key, shape in entry["shapes"].items()}
    merged = {key: torch.cat([part[key] for part in parts] or [empty[key]]) for key in empty}
    try:
        save(pack(merged), path, {"rows": len(next(iter(merged.values()))), "broken": broken})
    except OSError as error:
        free = human(shutil.disk_usage(path.parent).free)
        raise OSError(
            f"{error}. {free} are free there; the shards that are written are whole: make room and give the "
            "same command again, it goes on with this one"
        ) from None


def read_valid_rows(table: Table, rows: Sequence[int], broken: list[str] | None) -> list[Rows]:
    """The readable rows. `broken` receives the messages of the others; None: the first unreadable row is an error."""
    try:
        return [table.read(rows)]
    except UnreadableImage as error:
        if broken is None:
            raise ValueError(f"{error}; pass --skip_broken to leave such images out") from None
        if len(rows) == 1:
            broken.append(str(error))
            return []
        half = len(rows) // 2
        return read_valid_rows(table, rows[:half], broken) + read_valid_rows(table, rows[half:], broken)


def finish(folder: Path, index: Index) -> None:
    """Add the rows of every shard to the index, which completes the cache."""
    for name, entry in index["tables"].items():
        shards = range(-(-entry["total"] // entry["per_shard"]))
        notes = [note(folder / file(name, i)) for i in shards]
        entry["rows"] = [found["rows"] for found in notes]
        broken = {message for found in notes for message in found["broken"]}
        if broken:
            sys.stderr.write(f"{len(broken)} left out:\n" + "".join(f"  {message}\n" for message in sorted(broken)))
        if not sum(entry["rows"]):
            raise ValueError(f"no {name} could be read: the cache is not finished")
    for partial in folder.glob(".*"):  # left by a command that was killed
        if partial.name != LOCK:
            partial.unlink()
    write_atomically(folder / INDEX, json.dumps(index, indent=1))
    sys.stderr.write(f"finished {folder}; train with --data.cache {folder}\n")
