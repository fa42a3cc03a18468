"""Configuration: a recipe's dataclass is its command line. Nothing heavy is imported before the arguments are right."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, NoReturn, TypeVar

import tyro
import yaml

from distill.data import Digits
from distill.roles import FakeConfig, StudentConfig
from distill.trainer import TrainConfig

M = TypeVar("M")


@dataclass(frozen=True)
class Config(Generic[M]):
    """One experiment: the teacher, the student, the method and how to train."""

    method: M  # the algorithm and its hyper-parameters
    teacher: str = ""  # folder of the teacher's diffusers pipeline
    student: StudentConfig = field(default_factory=StudentConfig)
    fake: FakeConfig = field(default_factory=FakeConfig)
    data: Digits = field(default_factory=Digits)
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    smoke: bool = False  # two steps on a tiny random teacher, to see that everything runs


def fail(message: str) -> NoReturn:
    """End with one message for the user on stderr and exit status 2."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def parse(default: Config[M], argv: list[str] | None = None, doc: str | None = None) -> Config[M]:
    """The recipe's configuration, overridden by `--config file.yaml`, overridden by flags.

    An unknown flag, a wrong type or an impossible value ends with one message that names it, exit status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--config" in argv:
        i = argv.index("--config")
        path = Path(argv[i + 1]) if i + 1 < len(argv) else None
        if path is None or not path.is_file():
            fail(f"--config needs the path of a YAML file (as a run writes it to its config.yaml); got {path}")
        argv = _flags(yaml.safe_load(path.read_text()) or {}) + argv[:i] + argv[i + 2 :]
    kind = Config[type(default.method)]  # type: ignore[misc]
    try:
        return tyro.cli(kind, default=default, args=argv, description=doc, use_underscores=True)
    except ValueError as error:  # a value that a dataclass refuses
        fail(str(error))


def dump(config: Config[Any]) -> str:
    """The resolved configuration as YAML that `--config` reads back."""
    tree = dataclasses.asdict(config)
    tree |= tree.pop("train")
    return yaml.safe_dump(_plain(tree), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _flags(tree: dict[str, Any], prefix: str = "") -> list[str]:
    flags: list[str] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            flags += _flags(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            flags.append(f"--{prefix}{key}" if value else f"--{prefix}no_{key}")
        else:
            flags += [f"--{prefix}{key}", *map(str, value if isinstance(value, list) else [value])]
    return flags
