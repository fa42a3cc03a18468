"""The index of a cache: its teacher, its tables and their shards.

A cache is a folder with `index.json`, the texts in `texts.jsonl`, a table "text" of conditions and optionally a table
"image" of latents. A table is stored in shards `NAME-00000.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

from distill.data.online import SIZES
from distill.data.shards import Entry
from distill.data.teacher import Teacher
from distill.files import read_json

INDEX = "index.json"
TEXTS = "texts.jsonl"
BLOCK = 4096  # bytes; 64 of them stand for a file of weights
Index = dict[str, Any]  # parsed JSON

PARTS = {"class": "class", "text": "text encoder", "vae": "autoencoder"}  # of a fingerprint


def command(images: bool = False, teacher: str = "FOLDER", output_dir: str = "cache") -> str:
    """The command that makes a cache."""
    return (
        f"python -m pipelines.cache --pretrained_model_name_or_path {teacher} --prompts prompts.txt"
        f"{' --images IMAGES' * images} --output_dir {output_dir}"
    )


def read_index(folder: Path, images: bool = False) -> Index:
    """The index of a finished cache. ValueError, with the remedy, if the cache is absent, damaged or not finished."""
    if not (folder / INDEX).is_file():
        raise ValueError(f"no cache at {str(folder)!r}; make one with\n  {command(images, output_dir=str(folder))}")
    index = read_unfinished_index(folder)
    if any("rows" not in entry for entry in index["tables"].values()):
        raise ValueError(f"the cache {folder} is not finished: run the command that began it again, and it goes on")
    return index


def read_unfinished_index(folder: Path) -> Index:
    """The index of a cache that may not be finished. ValueError if it is damaged."""
    try:
        index = read_json(folder / INDEX)
        damage = _index_error(index)
    except ValueError as error:
        index = {}
        damage = f"{error}"
    except (KeyError, TypeError, AttributeError) as error:
        index = {}
        damage = f"an entry is missing or of another kind: {type(error).__name__} {error}"
    if damage:
        raise ValueError(f"{folder / INDEX} is damaged ({damage}): remove {folder}, and make the cache again")
    return index


def _index_error(index: Index) -> str | None:
    """The fault of an index; None if it is valid."""
    teacher = {key: index["teacher"][key] for key in ("name", *PARTS)}
    if not all(isinstance(value, str) for value in teacher.values()):
        return f"its teacher is {teacher}"
    if not _is_natural(index["prompts"]) or not index["prompts"] or not all(map(_is_natural, index["shape"])):
        return f"it has {index['prompts']!r} prompts and samples of shape {index['shape']!r}"
    if "ode" in index and not (isinstance(index["ode"]["network"], str) and _is_natural(index["ode"]["seed"])):
        return "its ode has no network and seed"
    for name, entry in index["tables"].items():
        if (fault := _table_error(name, entry)) is not None:
            return fault
    text = index["tables"]["text"].get("rows")
    if text and sum(text) <= index["prompts"]:
        return f"it has {index['prompts']} prompts, and {sum(text)} rows of them"
    return None


def _table_error(name: str, entry: Entry) -> str | None:
    """The fault of a table's entry in an index; None if it is valid."""
    numbers = [entry["total"], *entry.get("rows", ())]
    shapes = entry["shapes"]
    per_shard = entry["per_shard"]
    if not all(map(_is_natural, [*numbers, per_shard])) or not per_shard or not shapes:
        return f"its table {name} has {entry['total']!r} rows"
    if not all(map(_is_natural, (side for shape in shapes.values() for side in shape))):
        return f"its table {name} has rows of shapes {shapes!r}"
    if name == "image" and not {"x", "caption"} <= shapes.keys():
        return f"its table {name} has rows of {sorted(shapes)}"
    return None


def _is_natural(value: object) -> bool:
    """Whether a value of JSON is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def texts(folder: Path, n: int | None = None) -> list[str]:
    """The first n texts of a cache; by default all. ValueError if they are damaged or fewer."""
    path = folder / TEXTS
    lines_read = []
    if not path.is_file():
        raise ValueError(f"the cache {folder} has lost {TEXTS}: remove {folder}, and make the cache again")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(islice(lines, n), 1):
            try:
                lines_read.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is damaged ({error}): make the cache again") from None
            if not isinstance(lines_read[-1], str):
                raise ValueError(f"{path}, line {number}, is damaged (it is not text): make the cache again")
    if n is not None and len(lines_read) < n:
        raise ValueError(f"{path} holds {len(lines_read)} of {n} texts: make the cache again")
    return lines_read


def validate_teacher(folder: Path, index: Index, teacher: Teacher, images: bool) -> None:
    """ValueError if a cache was made for another teacher."""
    source = index["teacher"]
    target = fingerprint(teacher.parts.folder)
    looked = PARTS if images else {key: what for key, what in PARTS.items() if key != "vae"}
    differ = [f"its {what} differs" for key, what in looked.items() if source[key] != target[key]]
    sized = images or SIZES in index["tables"]["text"]["shapes"]
    if sized and list(teacher.shape) != index["shape"]:
        differ.append(f"its samples are {tuple(teacher.shape)}, those of the cache {tuple(index['shape'])}")
    if differ:
        again = command("image" in index["tables"], str(teacher.parts.folder), f"{folder}-{target['name']}")
        again += "".join(f" --{key} {value}" for key, value in teacher.parts.asked.items() if key == "resolution")
        raise ValueError(
            f"the cache {folder} was made for {source['class']} {source['name']!r}, this teacher is {target['class']} "
            f"{target['name']!r} ({', '.join(differ)}): make one for it with\n  {again}"
        )


def fingerprint(folder: Path) -> dict[str, str]:
    """Digests that identify a teacher's text encoders and autoencoder, without reading all of their weights."""
    index = read_json(folder / "model_index.json")
    parts = sorted(key for key, value in index.items() if isinstance(value, list) and value[0] is not None)
    hub = [part for part in folder.absolute().parts if part.startswith("models--")]  # the Hub's own cache
    return {
        "class": index["_class_name"],
        "name": hub[0].removeprefix("models--").replace("--", "/") if hub else folder.absolute().name,
        "text": digest(folder, [part for part in parts if part.startswith(("text_encoder", "tokenizer"))]),
        "vae": digest(folder, [part for part in parts if part.startswith("vae")]),
    }


def digest(folder: Path, parts: list[str]) -> str:
    """A digest of the files of some components: their names and sizes, and 64 blocks of each, the header included."""
    total = hashlib.blake2b(digest_size=16)
    for path in sorted(p for part in parts for p in (folder / part).iterdir() if p.is_file()):
        length = path.stat().st_size
        total.update(f"{path.relative_to(folder)} {length}".encode())
        with path.open("rb") as content:
            for block in range(64):
                content.seek(block * max(length // 64, BLOCK))
                total.update(content.read(BLOCK))
    return total.hexdigest()
