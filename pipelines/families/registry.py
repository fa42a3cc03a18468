"""The families by pipeline class of diffusers: every module of this package that assigns FAMILY defines one."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

from pipelines.families.base import Family


@cache
def families() -> dict[str, Family]:
    """{name: family}, in alphabetical order."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("*.py"))
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names]
    return {module.FAMILY.name: module.FAMILY for module in modules if hasattr(module, "FAMILY")}


def known_pipelines() -> dict[str, Family]:
    """{pipeline class of diffusers: the family that reads it}."""
    return {pipeline: family for family in families().values() for pipeline in family.pipelines}


def find_family(pipeline: str, source: object) -> Family:
    """The family that reads the class `pipeline`. If there is none, a ValueError that names `source`."""
    known = known_pipelines()
    if pipeline not in known:
        raise ValueError(f"{source} is a {pipeline}; supported pipelines are {sorted(known)}")
    return known[pipeline]
