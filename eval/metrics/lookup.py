"""Metrics by their names: of the table, or of a Python file of one's own.

BETTER = "higher"              # which values are better: lower, higher or neither
NEEDS = ("reference",)         # of reference, labels, texts, seeds, teacher; by default none
EXTRACTOR = "dinov2"           # whose features it reads; by default "pixels": it reads the images alone
LEAST = 2                      # images that it needs on each side

def compute(inputs):           # eval.metrics.registry.MetricInputs
    return ...                 # a number, a value of each image [N], a Score, or {name: one of these}

A value of each image gives the mean and its interval. The file's name is the metric's name in tables, and its content
is part of the hash. Name a file only if you trust it: it is run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from eval.features.weights import EXTRACTOR_NAMES
from eval.files import list_names, shorten
from eval.metrics.registry import METRICS, PIXELS, Metric, MetricInputs

if TYPE_CHECKING:
    from eval.metrics.intervals import Score

NEEDS = ("reference", "labels", "texts", "seeds", "teacher")


def find_metric(name: str) -> Metric:
    """An entry of the table, or the metric of a file. ValueError, with the nearest name, for an unknown name."""
    if is_file_name(name):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"there is no file {name} of a metric; eval/metrics/lookup.py says what it holds")
        return _read_metric(path, path.stat().st_mtime_ns)
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; {list_names(name, METRICS)}; or name a .py file")
    return METRICS[name]


def choose_extractor(metric: Metric, wanted: str | None) -> str:
    """The extractor of a metric: the wanted one, unless it is none whose features the metric reads."""
    fixed = metric.extractor == PIXELS or (metric.extractor == "lpips" and wanted != "random")
    return metric.extractor if fixed or wanted is None else wanted


def is_file_name(name: str) -> bool:
    """Whether a metric's name is that of a Python file."""
    return name.endswith(".py")


def column_name(name: str) -> str:
    """The name of a metric in tables."""
    return Path(name).stem if is_file_name(name) else name


@cache
def _read_metric(path: Path, _: int) -> Metric:
    """The metric of a file, cached by its time of change. ValueError that names every wrong value."""
    spec = importlib.util.spec_from_file_location(f"metric_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    if problems := _find_problems(module):
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return Metric(
        _with_scores(path, module.compute),
        getattr(module, "EXTRACTOR", PIXELS),
        module.BETTER,
        "mean",
        f"{path.name}, a file of one's own",
        tuple(getattr(module, "NEEDS", ())),
        getattr(module, "LEAST", 2),
    )


def _find_problems(module: ModuleType) -> list[str]:
    """What a file lacks or holds wrongly."""
    problems = []
    if not callable(getattr(module, "compute", None)):
        problems.append("there is no function compute(inputs)")
    better = getattr(module, "BETTER", None)
    if better not in ("lower", "higher", "neither"):
        problems.append(f"BETTER is {shorten(better)}; it must be lower, higher or neither")
    needs = getattr(module, "NEEDS", ())
    if not isinstance(needs, list | tuple):
        problems.append(f"NEEDS is {shorten(needs)}; it must be a tuple of names: {', '.join(NEEDS)}")
    else:
        wrong = [need for need in needs if need not in NEEDS]
        problems += [f"NEEDS has {shorten(need)}; {list_names(str(need), NEEDS)}" for need in wrong]
    extractor = getattr(module, "EXTRACTOR", PIXELS)
    if extractor == PIXELS and isinstance(needs, list | tuple) and {"reference", "texts"} & {*map(str, needs)}:
        problems.append("NEEDS has reference or texts, whose features need an EXTRACTOR, for example dinov2 or clip")
    if not isinstance(extractor, str) or extractor.partition(":")[0] not in (*EXTRACTOR_NAMES, PIXELS):
        names = list_names(str(extractor), (PIXELS, *EXTRACTOR_NAMES))
        problems.append(f"EXTRACTOR is {shorten(extractor)}; {names}")
    least = getattr(module, "LEAST", 2)
    if type(least) is not int or least < 1:
        problems.append(f"LEAST is {shorten(least)}; it must be a whole number from 1")
    return problems


def _with_scores(path: Path, compute: Callable[[MetricInputs], object]) -> Callable[[MetricInputs], dict[str, Score]]:
    """A function whose result is made of scores. Its errors name the file."""

    def run(inputs: MetricInputs) -> dict[str, Score]:
        try:
            found = compute(inputs)
            if not isinstance(found, Mapping):
                return {path.stem: _as_score(found, inputs.count)}
            return {f"{path.stem}_{key}": _as_score(value, inputs.count) for key, value in found.items()}
        except Exception as error:
            raise ValueError(f"{path}: {type(error).__name__}: {error}") from error

    return run


def _as_score(value: object, count: int) -> Score:
    """A score, a number, or a value of each image."""
    import torch

    from eval.metrics.intervals import Score, finite_score, mean_score

    if isinstance(value, Score):
        return value
    numbers = torch.as_tensor(value, dtype=torch.float64)
    if numbers.ndim == 0:
        return finite_score(numbers.item(), numbers.item(), numbers.item(), count)
    if numbers.shape != (count,):
        raise ValueError(f"compute gave values of shape {list(numbers.shape)}; a number or [{count}] is needed")
    return mean_score(numbers)
