"""The families by pipeline class of diffusers: every module of this package that assigns FAMILY defines one."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.families.base import Family


@cache
def families() -> dict[str, Family]:
    """{name: family}, in alphabetical order."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("*.py"))
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names]
    return {module.FAMILY.name: module.FAMILY for module in modules if hasattr(module, "FAMILY")}


def known_pipelines() -> dict[str, list[Family]]:
    """{pipeline class of diffusers: the families that read it}."""
    names = sorted({pipeline for family in families().values() for pipeline in family.pipelines})
    return {name: [family for family in families().values() if name in family.pipelines] for name in names}


def find_family(pipeline: str, source: object, scheduler: str | None = None) -> Family:
    """The family that reads the class `pipeline`, with this class of scheduler where several do.

    If there is none, a ValueError that names `source`.
    """
    known = known_pipelines()
    if pipeline not in known:
        raise ValueError(f"{source} is a {pipeline}; supported pipelines are {sorted(known)}")
    readers = sorted(known[pipeline], key=lambda family: bool(family.schedulers))
    return next((family for family in readers if scheduler in family.schedulers), readers[0])


def find_family_of(index: Mapping[str, Any], source: object) -> Family:
    """The family of a pipeline by the content of its model_index.json."""
    _, scheduler = index.get("scheduler") or (None, None)
    return find_family(index["_class_name"], source, scheduler)
