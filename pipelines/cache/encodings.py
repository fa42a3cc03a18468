"""Encode prompts and images once, for training without text encoders and autoencoder.

python -m pipelines.cache --pretrained_model_name_or_path FOLDER --prompts prompts.txt --output_dir cache

The cache is written shard by shard. Each shard is complete or absent, so the same command continues after an
interruption. With `accelerate launch` the processes share the shards. Without --prompts the images' captions are the
prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro

from distill import ranges
from distill.configuration import fail
from distill.data import Text, sources
from distill.data.index import INDEX, TEXTS, fingerprint, read_unfinished_index
from distill.data.online import Images, Texts
from distill.data.shards import Rows, Table, file, is_readable, narrow, note, pack, save
from distill.data.sources import UnreadableImage
from distill.files import LOCK, folder_lock, write_atomically
from distill.layout import program_name
from distill.ranges import Count, Natural
from distill.training.checkpoint import describe_disk_error

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pipelines.teacher import Teacher

TEACHER = tyro.conf.arg(name="pretrained_model_name_or_path")
SAMPLE = 8  # texts to encode for an estimate of the bytes per text


@dataclass(frozen=True)
class Cache:
    """The data to encode, and the folder of the cache."""

    teacher: Annotated[str, TEACHER] = ""  # folder or Hub name of the diffusers pipeline
    prompts: str = ""  # a table (.txt, .csv, .jsonl ...) or a dataset; "": the captions of the images
    images: str = ""  # a folder, tar shards 'x/{00..12}.tar' or a dataset, with captions
    output_dir: str = "cache"  # folder of the cache
    prompt_column: str | None = None  # column of the prompts; None: text, caption or prompt
    caption_column: str | None = None  # column of the captions; None: text, caption or prompt
    image_column: str = "image"  # column of the images in a dataset
    crops: Natural = 0  # random crops of each image, with SDXL's size conditions; 0: its centre square
    squeeze: bool = False  # resize the full image to the square, as DMD2 does
    max_samples: Count | None = None  # encode only the first N prompts and images
    resolution: Count | None = None  # pixels per side; None: the teacher's training resolution
    revision: str | None = None  # revision of the teacher on the Hub
    variant: str | None = None  # variant of the teacher's weight files, for example fp16
    batch_size: Count = 16  # prompts or images per encoder call
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # precision of the text encoders
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # precision of the stored tensors
    shard_bytes: Count = 10**9  # approximate size of a file in bytes
    skip_broken: bool = False  # skip unreadable images, and list them

    def __post_init__(self) -> None:
        ranges.validate_ranges(self)
        if self.squeeze and self.crops:
            raise ValueError(f"--squeeze leaves nothing for --crops {self.crops}: leave one of them out")

    def sources(self) -> Text:
        names = ("prompts", "images", "prompt_column", "caption_column", "image_column", "crops", "max_samples")
        return Text("online", **{name: getattr(self, name) for name in names})


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run. Every mistake of the user ends in one message."""
    try:
        config = tyro.cli(Cache, args=argv, description=__doc__, use_underscores=True, prog=program_name())
        run(config)
    except (ValueError, OSError) as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not (why := describe_disk_error(error)):
            raise
        fail(f"{why}, and give the same command again: it goes on")
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: the shards that are written stay; the same command goes on\n")
        raise SystemExit(130) from None


def run(config: Cache) -> Path:
    """Create or continue the cache of `config`, and return its folder."""
    with folder_lock(config.output_dir):
        return make_cache(config)


def make_cache(config: Cache) -> Path:
    """Write the cache into its folder, which no other process writes, and return the folder."""
    check(config)
    from pipelines.launch import silence_libraries, start_accelerator

    state = start_accelerator()
    folder = Path(config.output_dir)
    silence_libraries()
    prompts, pictures = config.sources().sources()
    teacher = encoders(config, state.device)
    text = Texts(teacher, prompts, pictures.captions if pictures else ())
    tables: dict[str, Table] = {"text": text}
    if pictures:
        tables["image"] = Images(teacher, pictures, text.captions, config.crops, config.squeeze)
    with state.main_process_first():  # it writes the index for the others
        index = open_or_create_index(folder, config, teacher, tables)
    for name, table in tables.items():
        fill(folder, name, table, index["tables"][name], config, state)
        state.wait_for_everyone()
        teacher.parts.drop_text()
    if state.is_main_process:
        finish(folder, index)
    return folder


def check(config: Cache) -> None:
    """Check everything that is visible before heavy imports."""
    if Path(config.teacher).is_dir() or not config.teacher:
        from pipelines.components import read_index

        read_index(config.teacher)
    if not (config.prompts or config.images):
        raise ValueError("nothing to encode: pass --prompts prompts.txt, or --images, a folder of images with captions")
    for source in filter(None, (config.prompts, config.images)):
        sources.validate_source(source)


def encoders(config: Cache, device: torch.device) -> Teacher:
    """The teacher without the weights of its network. The autoencoder works in float32."""
    import importlib

    from pipelines.components import Parts, locate_pipeline
    from pipelines.teacher import teacher_of

    parts = Parts(locate_pipeline(config.teacher, config.revision, config.variant), config.variant)
    parts.precision = getattr(torch, config.precision)
    parts.device = device
    if not any(name.startswith("text_encoder") for name in parts.index):
        raise ValueError(
            f"{parts.folder} is a {parts.index['_class_name']}: it has no text encoder, and needs no cache"
        )
    library, kind = parts.index[parts.network]
    config_of_net = parts.config(parts.network)
    try:
        with torch.device("meta"):
            net = getattr(importlib.import_module(library), kind).from_config(config_of_net)
    except Exception as error:  # classes raise many kinds of errors for a bad config
        raise ValueError(f"{parts.folder}: its {parts.network} ({kind}) cannot be made: {error}") from error
    parts.given[parts.network] = net
    if config.images:
        parts.given["vae"] = parts.component("vae", torch.float32)
    return teacher_of(parts, config.resolution)


def open_or_create_index(folder: Path, config: Cache, teacher: Teacher, tables: dict[str, Table]) -> dict[str, Any]:
    """The index of the cache: the one in the folder if it has the same configuration, or a new one."""
    text = tables["text"]
    images = tables.get("image")
    assert isinstance(text, Texts)
    work = hashlib.blake2b(json.dumps(text.texts).encode(), digest_size=16)
    if isinstance(images, Images):
        work.update(json.dumps([images.pictures.names, images.captions]).encode())
    index: dict[str, Any] = {
        "teacher": fingerprint(teacher.parts.folder),
        "shape": list(teacher.shape),
        "dtype": config.dtype,
        "precision": config.precision,
        "crops": config.crops,
        "prompts": text.prompts,
        "sources": work.hexdigest(),
    }
    if images is not None:
        index["squeeze"] = config.squeeze
    if (old := resume(folder, index)) is not None:
        return old
    index["tables"] = {"text": layout(config, len(text), text.read(spread(len(text), SAMPLE)))}
    if images is not None:
        one: Rows = {"x": torch.ones(1, *teacher.shape), "caption": torch.zeros(1, dtype=torch.int64)}
        one |= {"time_ids": torch.zeros(1, 6)} if config.crops else {}
        index["tables"]["image"] = layout(config, len(images), one)
    return begin(folder, index, text.texts[:-1])


def resume(folder: Path, index: dict[str, Any]) -> dict[str, Any] | None:
    """The index in the folder; None if there is none. ValueError if its configuration differs from that of `index`."""
    if (folder / INDEX).is_file():
        old = read_unfinished_index(folder)
        changed = [key for key in index if old.get(key) != index[key]]
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


def begin(folder: Path, index: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Write the first files of a cache, and return the index with the versions of the libraries."""
    libraries = ("distill-one-step", "torch", "diffusers", "transformers")
    index = index | {"versions": {name: version(name) for name in libraries}}
    announce(folder, index)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TEXTS, "".join(f"{json.dumps(text)}\n" for text in texts))
    write_atomically(folder / INDEX, json.dumps(index, indent=1))
    return index


def spread(n: int, k: int) -> list[int]:
    """Up to k of n rows, evenly spaced."""
    return sorted({i * n // k for i in range(k)})


def layout(config: Cache, total: int, rows: Rows) -> dict[str, Any]:
    """The shards of a table with `total` rows that have the average size of `rows`."""
    stored = pack(narrow(rows, getattr(torch, config.dtype)))
    each = sum(t.nbytes for t in stored.values()) / len(next(iter(rows.values())))
    shapes = {key: list(value.shape[1:]) for key, value in rows.items()}
    return {
        "total": total,
        "bytes": each,
        "per_shard": max(1, min(total, int(config.shard_bytes / each))),
        "shapes": shapes,
    }


def announce(folder: Path, index: dict[str, Any]) -> None:
    """Print the number of bytes of the cache. ValueError if the disk has less space."""
    fewer = "fewer --max_samples or --crops, or encode while training (--data.text online)"
    fewer = "a smaller --n" if "ode" in index else fewer
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
    sys.stderr.write("\n".join(lines) + "\n")
    near = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(near).free
    if need > free:
        raise ValueError(
            f"the cache needs {human(need)} more and the disk of {near} has {human(free)} free: choose another "
            f"--output_dir, or {fewer}"
        )


def human(n: float) -> str:
    """Bytes in a readable form: 159 GB."""
    power = min(4, int(math.log10(max(n, 1))) // 3)
    n /= 1000**power
    return f"{n:.{1 if n < 100 and power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def fill(folder: Path, name: str, table: Table, entry: dict[str, Any], config: Cache, state: Accelerator) -> None:
    """Write the missing shards; each process writes its part of them."""
    from distill.progress import bar

    total = entry["total"]
    per_shard = entry["per_shard"]
    mine = range(total)[::per_shard][state.process_index :: state.num_processes]
    todo = [first for first in mine if not is_readable(folder / file(name, first // per_shard))]
    rows = {first: range(first, min(first + per_shard, total)) for first in todo}
    here = sum(map(len, rows.values()))
    done = sum(min(per_shard, total - first) for first in mine if first not in rows)
    with bar(here + done, "row", name, state.is_main_process, done) as shown:
        for first in todo:
            shard: list[Rows] = []
            broken: list[str] | None = [] if config.skip_broken else None
            for i in range(0, len(rows[first]), config.batch_size):
                batch = rows[first][i : i + config.batch_size]
                shard += [narrow(part, getattr(torch, config.dtype)) for part in read_valid_rows(table, batch, broken)]
                shown.update(len(batch))
            empty = {key: torch.zeros(0, *shape) for key, shape in entry["shapes"].items()}
            merged = {key: torch.cat([part[key] for part in shard] or [empty[key]]) for key in empty}
            path = folder / file(name, first // per_shard)
            about = {"rows": len(next(iter(merged.values()))), "broken": broken or []}
            try:
                save(pack(merged), path, about)
            except OSError as error:
                free = human(shutil.disk_usage(folder).free)
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


def finish(folder: Path, index: dict[str, Any]) -> None:
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
