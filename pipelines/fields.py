"""Checks of component configs. Values that would crash the classes that read them are refused by name.

A message names the file, the field, its value and the allowed values. Fields outside the tables below are left to the
classes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

BYTES = 2**24  # maximum size of a config
DEPTH = 1000  # maximum number of layers of a network
LONGEST = 100_000  # maximum number of steps of a schedule
SIDE = 2**16  # maximum side of a sample
SHOWN = 60  # maximum characters of a value in a message

LAYERS = re.compile("layers|depth|num_.*blocks|_channels$|_types$")  # "block_out_channels" has one entry per level
RATIOS = ("beta_start", "beta_end")
POSITIVE = ("shift", "flow_shift", "sigma_max", "sigma_data", "rho", "scaling_factor")
STEPS = ("num_train_timesteps", "original_inference_steps")
NAMES = ("beta_schedule", "prediction_type", "timestep_spacing")
MOMENTS = {"latents_mean": "a number", "latents_std": "a number above 0"}
COUNTS = ("in_channels", "out_channels", "latent_channels", "z_dim")
SQUARE = (
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "SD3Transformer2DModel",
)  # their sample_size is one side
NEEDED = {  # class -> fields that may not be null
    "AutoencoderKL": ("scaling_factor", "block_out_channels"),
    "AutoencoderDC": ("scaling_factor", "encoder_block_out_channels"),
    "AutoencoderTiny": ("scaling_factor", "encoder_block_out_channels"),
    "AutoencoderKLWan": (*MOMENTS, "dim_mult"),
    "AutoencoderKLQwenImage": (*MOMENTS, "dim_mult"),
}


class Constraint(NamedTuple):
    """What a field may hold: a check of its value, and the allowed values in words."""

    check: Callable[[object], bool]
    allowed: str


def is_whole_number(value: object, low: int, high: int) -> bool:
    """Whether a value is an integer from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return is_number(value) and value > 0


def _is_side(value: object) -> bool:
    return is_whole_number(value, 1, SIDE)


def _is_count(value: object) -> bool:
    return is_whole_number(value, 1, LONGEST)


def _is_size(value: object) -> bool:
    sides = value if isinstance(value, list) else [value]
    return len(sides) in (1, 2, 3) and all(map(_is_side, sides))


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len({*value}) == len(value)


def _is_shallow(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= DEPTH and all(map(_is_shallow, value))
    return not isinstance(value, int) or value <= DEPTH


LENGTH = Constraint(_is_side, f"a whole number from 1 to {SIDE:,}")
ABOVE_0 = Constraint(_is_positive, "a number above 0")
SHALLOW = Constraint(_is_shallow, f"at most {DEPTH:,} layers")
CONSTRAINTS: dict[str, Constraint] = {  # fields of a component's config that are not null
    **dict.fromkeys(COUNTS, LENGTH),
    **dict.fromkeys(STEPS, Constraint(_is_count, f"a whole number from 1 to {LONGEST:,}")),
    **dict.fromkeys(
        RATIOS, Constraint(lambda value: is_number(value) and 0 < value < 1, "a number above 0 and below 1")
    ),
    **dict.fromkeys(POSITIVE, ABOVE_0),
    **dict.fromkeys(NAMES, Constraint(lambda value: isinstance(value, str), "a name")),
    "sigma_min": Constraint(lambda value: is_number(value) and value >= 0, "a number of at least 0"),
    "trained_betas": Constraint(
        lambda value: isinstance(value, list) and 0 < len(value) <= LONGEST and _are_numbers(value),
        f"null, or a list of up to {LONGEST:,} numbers",
    ),
    "sample_size": Constraint(_is_size, f"null, or a whole number from 1 to {SIDE:,}"),
}
FACTS: dict[str, Constraint] = {  # fields of distill.json
    "student": Constraint(lambda value: isinstance(value, bool), "true or false"),
    "null_class": Constraint(lambda value: is_whole_number(value, 0, LONGEST), "a label, a whole number from 0"),
    "c_noise": ABOVE_0,
    "steps": Constraint(_is_count, "a whole number from 1"),
    "times": Constraint(_are_numbers, "a list of numbers"),
    "config": Constraint(lambda value: isinstance(value, str | dict), "text or an object"),
    "class_names": Constraint(_are_names, "a list of different names"),
    "resolution": LENGTH,
    "frames": LENGTH,
}


def facts(folder: Path) -> dict[str, Any]:
    """distill.json of a pipeline's folder; {} if there is none. A field that is null counts as absent."""
    path = folder / "distill.json"
    if not path.exists():
        return {}
    found = {key: value for key, value in read(path).items() if value is not None}
    for key, value in found.items():
        constraint = FACTS.get(key)
        if constraint is not None and not constraint.check(value):
            fault = f"{key} is {_shorten(value)}; it must be {constraint.allowed}"
            raise ValueError(f"{path}: {fault}: export or download the model again")
    if found.get("student") and "steps" not in found:
        raise ValueError(f"{path} says no steps of its student: export or download the model again")
    return found


def read(path: Path) -> dict[str, Any]:
    """A config whose values are usable."""
    if not path.is_file():
        raise ValueError(f"there is no {path}: download or copy the whole pipeline")
    if path.stat().st_size > BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, too many for a config")
    try:
        found = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object of fields")
    for key, value in found.items():
        if allowed := allowed_if_wrong(key, value, found):
            raise ValueError(f"{path}: {key} is {_shorten(value)}; it must be {allowed}: correct or download it")
    return found


def allowed_if_wrong(key: str, value: object, config: dict[str, Any]) -> str | None:
    """A description of a field's allowed values if its value is not one of them; else None."""
    kind = str(config.get("_class_name"))
    constraint = CONSTRAINTS.get(key)
    if constraint is None and LAYERS.search(key):
        constraint = SHALLOW
    if key in MOMENTS:
        constraint = Constraint(
            lambda value: _of_channels(value, config, key == "latents_std"), f"{MOMENTS[key]} for each channel"
        )
    if key == "sample_size" and kind in SQUARE:
        constraint = LENGTH
    elif value is None:
        return "given" if key in NEEDED.get(kind, ()) else None
    return None if constraint is None or constraint.check(value) else constraint.allowed


def _of_channels(values: object, config: dict[str, Any], positive: bool) -> bool:
    if not isinstance(values, list) or not all(map(is_number, values)):
        return False
    channels = config.get("latent_channels") or config.get("z_dim") or len(values)
    return len(values) == channels and (not positive or all(value > 0 for value in values))


def _shorten(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
