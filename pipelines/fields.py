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
from typing import Any

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


FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {  # fields of distill.json: (check of a value, allowed values)
    "student": (lambda value: isinstance(value, bool), "true or false"),
    "null_class": (lambda value: is_whole_number(value, 0, LONGEST), "a label, a whole number from 0"),
    "c_noise": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "steps": (lambda value: is_whole_number(value, 1, LONGEST), "a whole number from 1"),
    "times": (lambda value: isinstance(value, list) and all(map(is_number, value)), "a list of numbers"),
    "config": (lambda value: isinstance(value, str | dict), "text or an object"),
    "resolution": (lambda value: is_whole_number(value, 1, SIDE), f"a whole number from 1 to {SIDE:,}"),
    "frames": (lambda value: is_whole_number(value, 1, SIDE), f"a whole number from 1 to {SIDE:,}"),
}


def facts(folder: Path) -> dict[str, Any]:
    """distill.json of a pipeline's folder; {} if there is none. A field that is null counts as absent."""
    path = folder / "distill.json"
    if not path.exists():
        return {}
    found = {key: value for key, value in read(path).items() if value is not None}
    for key, value in found.items():
        check, kind = FACTS.get(key, (lambda value: True, ""))
        if not check(value):
            raise ValueError(
                f"{path}: {key} is {_shorten(value)}; it must be {kind}: export or download the model again"
            )
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


def allowed_if_wrong(key: str, value: Any, config: dict[str, Any]) -> str | None:
    """A description of a field's allowed values if its value is not one of them; else None."""
    kind = str(config.get("_class_name"))
    if key == "sample_size" and kind in SQUARE:
        return None if is_whole_number(value, 1, SIDE) else f"a whole number from 1 to {SIDE:,}"
    if value is None:
        return "given" if key in NEEDED.get(kind, ()) else None
    if key in COUNTS:
        return None if is_whole_number(value, 1, SIDE) else f"a whole number from 1 to {SIDE:,}"
    if key in STEPS:
        return None if is_whole_number(value, 1, LONGEST) else f"a whole number from 1 to {LONGEST:,}"
    if key in RATIOS:
        return None if is_number(value) and 0 < value < 1 else "a number above 0 and below 1"
    if key in POSITIVE:
        return None if is_number(value) and value > 0 else "a number above 0"
    if key == "sigma_min":
        return None if is_number(value) and value >= 0 else "a number of at least 0"
    if key == "trained_betas":
        betas = isinstance(value, list) and 0 < len(value) <= LONGEST and all(map(is_number, value))
        return None if betas else f"null, or a list of up to {LONGEST:,} numbers"
    if key in NAMES:
        return None if isinstance(value, str) else "a name"
    if key in MOMENTS:
        return None if _of_channels(value, config, key == "latents_std") else f"{MOMENTS[key]} for each channel"
    if key == "sample_size":
        sides = value if isinstance(value, list) else [value]
        sized = len(sides) in (1, 2, 3) and all(is_whole_number(side, 1, SIDE) for side in sides)
        return None if sized else f"null, or a whole number from 1 to {SIDE:,}"
    if LAYERS.search(key):
        return None if _is_shallow(value) else f"at most {DEPTH:,} layers"
    return None


def is_whole_number(value: Any, low: int, high: int) -> bool:
    """Whether a value is an integer from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _of_channels(values: Any, config: dict[str, Any], positive: bool) -> bool:
    if not isinstance(values, list) or not all(map(is_number, values)):
        return False
    channels = config.get("latent_channels") or config.get("z_dim") or len(values)
    return len(values) == channels and (not positive or all(value > 0 for value in values))


def _is_shallow(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= DEPTH and all(map(_is_shallow, value))
    return not isinstance(value, int) or value <= DEPTH


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
