"""manifest.json: what the images of a folder are. It imports no library that takes time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.files import write_atomically
from eval.files import read_json, shorten

MANIFEST = "manifest.json"
Manifest = dict[str, Any]  # the values of a manifest.json: see FIELDS
LARGEST = 1e18  # of a number in a file; more is damage, and a plot could not show it


def is_count(value: object) -> bool:
    """Whether a value of JSON is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def is_finite(value: object) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def is_number(value: object) -> bool:
    """Whether a value of JSON is a finite number that is not negative."""
    return isinstance(value, int | float) and is_finite(value) and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_labels(value: object) -> bool:
    return isinstance(value, list) and all(type(label) is int and 0 <= label <= LARGEST for label in value)


def _are_costs(value: object) -> bool:
    return isinstance(value, dict) and all(v is None or _is_text(v) or is_number(v) for v in value.values())


FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {  # of a manifest: (check, what it must be); null is allowed
    "n": (is_count, "a number of images"),
    "shape": (lambda v: isinstance(v, list) and len(v) == 3 and all(map(is_count, v)), "three sizes [C, H, W]"),
    "labels": (_are_labels, "a list of labels, whole numbers from 0"),
    "complete": (lambda v: isinstance(v, bool), "true or false"),
    "seed": (lambda v: type(v) is int, "a whole number"),
    "cost": (_are_costs, "names with numbers from 0 or text"),
    "request": (lambda v: isinstance(v, dict), "names with values"),
    **dict.fromkeys(("steps",), (is_count, "a number of steps")),
    **dict.fromkeys(("guidance", "nfe", "seconds", "images_per_second", "parameters"), (is_number, "a finite number")),
    **dict.fromkeys(
        ("name", "model", "kind", "scheduler", "protocol", "hash", "commit", "hardware", "model_hash"),
        (_is_text, "text"),
    ),
}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically."""
    write_atomically(folder / MANIFEST, json.dumps(manifest) + "\n")


def read_manifest(folder: str | Path, unfinished: bool = False) -> Manifest:
    """The manifest of a folder of images; {} if it has none.

    ValueError for an absent folder, broken JSON, a field of a wrong kind, or a folder that is not complete (unless
    `unfinished`).
    """
    path = Path(folder) / MANIFEST
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {folder}")
    if not path.exists():
        return {}
    manifest = _check_manifest(read_json(path, "generate the folder again"), path)
    if not unfinished and not manifest.get("complete", True):
        count = len(list(Path(folder).glob("*.png")))
        raise ValueError(
            f"{folder} is not complete: {count} of {manifest.get('n')} images are there; run the command that makes "
            "them again, and it goes on"
        )
    return manifest


def _check_manifest(manifest: object, path: Path) -> Manifest:
    """The same manifest. ValueError for a field of a wrong kind, and for another number of labels than images."""
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is not a JSON object; generate the folder again")
    for key, (check, kind) in FIELDS.items():
        if manifest.get(key) is not None and not check(manifest[key]):
            raise ValueError(f"{path}: {key} is {shorten(manifest[key])}; it must be {kind}. Generate the folder again")
    labels = manifest.get("labels")
    if labels is not None and len(labels) != manifest.get("n"):
        raise ValueError(
            f"{path} has {len(labels)} labels for n = {manifest.get('n')} images; generate the folder again"
        )
    return manifest
