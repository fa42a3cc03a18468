"""The part of a run's configuration that a model card shows: values that differ from the defaults, without paths."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import yaml

from distill import data, methods
from distill.configuration import Config
from distill.training.config import TrainConfig

PRIVATE = (  # fields that say how a run was started, not how its student was trained
    "output_dir",
    "resume_from_checkpoint",
    "resume_allow",
    "replay",
    "smoke",
    "family",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "license",
    "report_to",
    "logging_steps",
    "hang_seconds",
    "checkpoints_total_limit",
    "checkpointing_steps",
    "validation_steps",
    "validation_images",
)
EMPTY: tuple[object, ...] = (None, "", [], {})
Tree = dict[str, object]


def changed_values(text: str) -> str:
    """The values of a run's config.yaml that differ from the defaults, as YAML. Of a path only its last name is shown.

    Text that is no configuration is returned as it is.
    """
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if not isinstance(tree, dict):
        return text
    defaults = _defaults(text) | {"data": _data_defaults(tree.get("data"))}
    found = _changes({key: value for key, value in tree.items() if key not in PRIVATE}, defaults)
    return yaml.safe_dump(found, sort_keys=False) if found else ""


def training_facts(text: str) -> dict[str, object]:
    """The values of a run's config.yaml that every card names; {} for a student that was not trained here."""
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    names = {
        "max_train_steps": "training steps",
        "train_batch_size": "batch",
        "learning_rate": "learning rate",
        "seed": "seed",
    }
    return {title: tree[name] for name, title in names.items() if isinstance(tree, dict) and name in tree}


def _defaults(text: str) -> Tree:
    """The defaults of all fields: those of the method that the first line names, of the student and of the training."""
    named = re.match(r"# (\w+)\n", text)
    method = getattr(methods, named[1], None) if named and named[1] in methods.__all__ else None
    return _of_fields(Config) | _of_fields(TrainConfig) | {"method": _of_fields(method) if method else {}}


def _data_defaults(values: object) -> Tree:
    """The defaults of the kind of data that has these fields; {} if there is none."""
    kinds = [kind for kind in vars(data).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    trees = (_of_fields(kind) for kind in kinds if isinstance(values, dict) and _names(kind) == set(values))
    return next(trees, {})


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _of_fields(kind: type) -> Tree:
    """The defaults of a dataclass, as a tree of plain values. Fields without a default are left out."""
    tree: Tree = {}
    for field in dataclasses.fields(kind):
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if value is not dataclasses.MISSING:
            tree[field.name] = _plain(value)
    return tree


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _changes(tree: Tree, defaults: Tree) -> Tree:
    """The entries of a tree that are neither empty nor equal to the default of their name."""
    found: Tree = {}
    for key, value in tree.items():
        default = defaults.get(key)
        if isinstance(value, dict):
            value = _changes(value, default if isinstance(default, dict) else {})
        if value not in EMPTY and (key not in defaults or value != default):
            found[key] = _without_folder(value)
    return found


def _without_folder(value: object) -> object:
    """The last name of an absolute path; any other value as it is."""
    if isinstance(value, list):
        return [_without_folder(inner) for inner in value]
    local = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return Path(str(value)).name if local else value
