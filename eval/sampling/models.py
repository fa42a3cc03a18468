"""The name, the hash and the distill.json of a model."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from eval.files import read_json
from eval.images.manifest import is_count

Tree = dict[str, Any]  # of a JSON file
EXPORTS = ("pipeline", "watch", "lora", "pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model")


def read_distill_json(model: Path) -> Tree:
    """The distill.json of an exported folder; {} for others. ValueError where there is no model."""
    if not model.is_dir():
        raise ValueError(f"there is no model folder {model}; train or export one first")
    path = model / "distill.json"
    facts = read_json(path, "export the model again") if path.exists() else {}
    if not isinstance(facts, dict) or not (facts.get("steps") is None or is_count(facts["steps"])):
        raise ValueError(f"{path} is not a JSON object, or has no number of steps; export the model again")
    return facts


def model_name(model: Path) -> str:
    """The name of a folder or a file in tables: the name of its run, if its own name is that of every export.

    runs/dmd2/pipeline is dmd2, runs/dmd2/watch/checkpoint-500/pipeline is dmd2-checkpoint-500.
    """
    parts = list(Path(os.path.normpath(model.absolute())).parts)
    if model.suffix == ".safetensors":
        parts[-1] = model.stem
    while len(parts) > 2 and parts[-1] in EXPORTS:
        parts.pop()
    name = parts.pop()
    if re.fullmatch(r"checkpoint-\d+", name):
        while len(parts) > 2 and parts[-1] in EXPORTS:
            parts.pop()
        return f"{parts[-1]}-{name}" if len(parts) > 1 else name
    return name


def model_hash(*models: Path) -> str:
    """The first 16 hex digits of the SHA-256 of the weights and configuration of folders, or of files."""
    total = hashlib.sha256()
    for model in models:
        listed = [f for f in model.rglob("*") if f.suffix in (".safetensors", ".json")] if model.is_dir() else [model]
        for file in sorted(listed):
            with file.open("rb") as stream:
                name = file.relative_to(model) if model.is_dir() else file.name
                total.update(f"{name}".encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]
