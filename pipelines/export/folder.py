"""The files of a pipeline folder: those of the teacher, with another network and scheduler."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from pipelines import fields
from pipelines.components import Network, Scheduler, is_variant
from pipelines.export.license import license_files
from pipelines.teacher import Teacher

PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")  # model.safetensors, not model.fp16.safetensors
WEIGHTS = re.compile(r".+\.(safetensors|bin|msgpack|onnx|onnx_data|h5|ckpt|pt|pth|xml)(\.index.*)?")


def check_replaceable(folder: Path) -> None:
    """ValueError if `folder` holds anything but an earlier export, because an export replaces the whole folder."""
    try:
        folder = folder.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder} is a link that leads nowhere ({error}): choose another --output_dir") from None
    if folder.is_mount():
        raise ValueError(f"{folder} is where a disk is mounted and cannot be replaced: choose a folder inside it")
    try:
        ours = fields.facts(folder).get("student") is True
    except ValueError:  # damaged: not an export
        ours = False
    if folder.exists() and not (ours or folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an earlier export: choose another --output_dir")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} is not a writable folder: choose another --output_dir")


def write_pipeline(teacher: Teacher, net: Network, scheduler: Scheduler, folder: Path) -> None:
    """Write the pipeline folder of the teacher with another network and scheduler, and the files of its licence."""
    parts = teacher.parts
    index = dict(parts.index)
    for name, entry in parts.index.items():
        if isinstance(entry, list) and entry[0] is not None and name not in (parts.network, "scheduler"):
            if not copy_component(parts.folder / name, folder / name, parts.variant):
                shutil.rmtree(folder / name)
                index[name] = [None, None]
    for file in license_files(parts.folder):
        shutil.copy(file, folder / file.name)
    net.save_pretrained(folder / parts.network, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index["_name_or_path"] = ""
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_component(source: Path, target: Path, variant: str | None) -> bool:
    """Copy the files of a component. Of several variants of the weights, copy the loaded one under its plain name.

    False if the weights exist only as pickles. These are not copied: an example is a safety checker, which nothing
    loads.
    """
    files = [f for f in sorted(source.rglob("*")) if f.is_file()]
    tag = f".{variant}"
    tagged = [f for f in files if variant and is_variant(f, variant)]
    for file in files:
        if WEIGHTS.fullmatch(file.name) and file not in tagged and (tagged or not PLAIN.fullmatch(file.name)):
            continue
        to = target / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if file not in tagged:
            shutil.copy(file, to)
        elif file.suffix == ".json":  # the index names the shards
            to.with_name(file.name.replace(tag, "")).write_text(file.read_text().replace(tag, ""))
        else:
            shutil.copy(file, to.with_name(file.name.replace(tag, "")))
    weights = lambda folder: any(WEIGHTS.fullmatch(file.name) for file in folder.rglob("*"))
    return weights(target) or not weights(source)
