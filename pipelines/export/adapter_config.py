"""The scale of a published LoRA: alpha and rank from PEFT's adapter_config.json, or from a file's own metadata.

A LoRA adds scale up down to a weight. PEFT: scale = alpha / r, with use_rslora alpha / sqrt(r). kohya: alpha / r.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distill.files import read_text

FILE = "adapter_config.json"  # beside the weights, written by PEFT
ALTERED = ("pissa", "olora", "loftq", "corda")  # values of init_lora_weights that also change the base's weights
REFUSED = {  # option of LoraConfig: the reason why a LoRA with it is refused
    "use_dora": "a DoRA scales every row of a weight",
    "use_qalora": "a QALoRA pools its input",
    "fan_in_fan_out": "its weights are transposed",
    "layer_replication": "its network has more layers than the base",
    "modules_to_save": "it replaces whole modules of the base",
    "lora_bias": "it has biases",
}


@dataclass(frozen=True)
class Options:
    """The options of PEFT's LoraConfig that decide the scale. Patterns: regular expression of module names -> value."""

    r: float | None
    lora_alpha: float | None
    rank_pattern: dict[str, float]
    alpha_pattern: dict[str, float]
    use_rslora: bool


@dataclass(frozen=True)
class Settings:
    """The source of alpha. source: its file; lora: PEFT's options; kohya: ss_network_alpha."""

    source: str
    lora: Options | None = None
    kohya: float | None = None

    def alpha(self, module: str, r: int) -> float | None:
        """alpha of a module (scale alpha / r); None if it is not given. ValueError if the rank is not r."""
        if self.lora is None:
            return self.kohya
        from peft.utils.other import get_pattern_key

        value = lambda pattern, default: pattern.get(get_pattern_key(pattern, module), default)
        rank = value(self.lora.rank_pattern, self.lora.r)
        if rank is not None and rank != r:
            raise ValueError(f"{self.source} says that the LoRA of {module} has rank {rank}; its tensors have {r}")
        alpha = value(self.lora.alpha_pattern, self.lora.lora_alpha)
        if alpha is None:
            raise ValueError(f"{self.source} has no lora_alpha for {module}; add it: the scale is lora_alpha / r")
        return float(alpha) * math.sqrt(r) if self.lora.use_rslora else float(alpha)

    def __str__(self) -> str:
        if self.lora is None:
            return f"ss_network_alpha {self.kohya:g} in {self.source}"
        rs = " with use_rslora" if self.lora.use_rslora else ""
        return f"lora_alpha {self.lora.lora_alpha:g}{rs} in {self.source}"


def read_settings(path: Path, metadata: dict[str, str], prefix: str) -> Settings | None:
    """The source of alpha for `path`: its metadata (diffusers, kohya), else adapter_config.json beside it.

    prefix: prefix of the network's keys in diffusers' metadata. A ValueError names an option that is not supported.
    """
    if "lora_adapter_metadata" in metadata:
        source = f"lora_adapter_metadata of {path.name}"
        found = _object(metadata["lora_adapter_metadata"], source)
        dot = f"{prefix}."
        if own := {key.removeprefix(dot): value for key, value in found.items() if key.startswith(dot)}:
            return Settings(source, _options(own, source))
    beside = path.parent / FILE
    if beside.is_file():
        return Settings(FILE, _options(_object(read_text(beside), f"{beside}"), f"{beside}"))
    if "ss_network_alpha" in metadata:
        return Settings(
            f"metadata of {path.name}", kohya=_number(metadata["ss_network_alpha"], "ss_network_alpha", path)
        )
    return None


def _object(text: str, source: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{source} is damaged: it is not a JSON object")
    return found


def _options(given: Mapping[str, object], source: str) -> Options:
    """The options; ValueError names an unsupported one, or a value that is not allowed."""
    _refuse_other_adapters(given, source)
    rslora = given.get("use_rslora")
    if not isinstance(rslora, bool | None):
        raise ValueError(f"{source} has use_rslora {rslora!r}; it must be true or false")
    number = lambda key: None if given.get(key) is None else _number(given[key], key, source)
    ranks = _pattern(given, "rank_pattern", source)
    alphas = _pattern(given, "alpha_pattern", source)
    return Options(number("r"), number("lora_alpha"), ranks, alphas, bool(rslora))


def _refuse_other_adapters(given: Mapping[str, object], source: str) -> None:
    """ValueError for options of an adapter that is no plain LoRA on its base."""
    kind = given.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{source} has peft_type {kind!r}; only LORA is read")
    for key, why in REFUSED.items():
        if given.get(key):
            raise ValueError(
                f"{source} has {key} {given[key]!r}: {why}, which is not read. Merge it into its base with PEFT, and "
                "give the whole network"
            )
    if (bias := given.get("bias") or "none") != "none":
        raise ValueError(f"{source} has bias {bias!r}; only a LoRA without biases is read: 'none'")
    start = given.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(ALTERED):
        raise ValueError(
            f"{source} has init_lora_weights {start!r}: its base's weights were changed, too. Convert it to a plain "
            "LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )


def _pattern(given: Mapping[str, object], key: str, source: str) -> dict[str, float]:
    """The numbers of an option by module; ValueError for anything else."""
    pattern = given.get(key) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{source} has {key} {pattern!r}; it must be an object of numbers by module")
    if odd := [name for name in pattern if not _is_simple(name)]:
        raise ValueError(f"{source} has a {key} for {odd[0]!r}; name modules, or two .* at most among their names")
    return {name: _number(value, f"{key} of {name}", source) for name, value in pattern.items()}


def _number(value: object, key: str, source: str | Path) -> float:
    found = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"{source} has {key} {value!r}; it must be a number")
    return found


def _is_simple(pattern: str) -> bool:
    """Whether a pattern is a regular expression that takes little time on any module name."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return len(re.findall(r"[*+?{]", pattern)) <= 2 and not re.search(r"\)[*+?{]", pattern)
