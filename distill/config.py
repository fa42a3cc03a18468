"""Configuration: a recipe's dataclass is its command line. Nothing heavy is imported before the arguments are right."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, NoReturn, TypeVar

import tyro
import yaml

from distill.roles import FakeConfig, StudentConfig
from distill.trainer import TrainConfig

M = TypeVar("M")
D = TypeVar("D")
T = TypeVar("T")
TEACHER = tyro.conf.arg(aliases=["--pretrained_model_name_or_path", "--pretrained_teacher_model"])


@dataclass(frozen=True)
class Config(Generic[M, D]):
    """One experiment: the teacher, the student, the method and how to train."""

    method: M  # the algorithm and its hyper-parameters
    data: D  # conditions and, where the method needs them, real images
    teacher: Annotated[str, TEACHER] = ""  # folder or Hub name of the teacher's diffusers pipeline
    revision: str | None = None  # of the teacher on the Hub
    variant: str | None = None  # of the teacher's weight files: fp16
    resolution: int | None = None  # pixels of a side; None: what the teacher was trained for
    frames: int | None = None  # of a video; None: what the teacher was trained for
    student: StudentConfig = field(default_factory=StudentConfig)
    fake: FakeConfig = field(default_factory=FakeConfig)
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    validation_images: int = 8  # of a grid of samples, from the data's first prompts
    push_to_hub: bool = False  # upload the verified export
    hub_model_id: str | None = None  # user/name; None: the name of output_dir
    hub_private: bool = False  # a new repository on the Hub is private
    license: str | None = None  # of the student, where the teacher's is not known: apache-2.0, say, or NAME,URL
    family: str = "edm"  # of the tiny random teacher of --smoke
    replay: str | None = None  # a run's replay-STEP-PLAYER: only compute that update again; status 1: not finite again
    smoke: bool = False  # two steps on a tiny random teacher, to see that everything runs


def fail(message: str) -> NoReturn:
    """End with one message for the user on stderr and exit status 2."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def parse(default: Config[M, D], argv: list[str] | None = None, doc: str | None = None) -> Config[M, D]:
    """The recipe's configuration, overridden by `--config file.yaml`, overridden by flags.

    An unknown flag, a wrong type or an impossible value ends with one message that names it, exit status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    ours = ("--config=", "--replay=")
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith(ours) else [arg])]
    if "--replay" in argv[:-1] and "--config" not in argv:
        argv += ["--config", f"{argv[argv.index('--replay') + 1]}/config.yaml"]
    if "--config" in argv:
        i = argv.index("--config")
        argv = _file(argv[i + 1 : i + 2]) + argv[:i] + argv[i + 2 :]
    doc = f"{doc or ''}\n\n--config FILE.yaml, a run's config.yaml say, sets all that it holds; flags go on top."
    kind: Any = Config.__class_getitem__((type(default.method), type(default.data)))  # type: ignore[attr-defined]
    try:
        return tyro.cli(kind, default=default, args=argv, description=doc, use_underscores=True)
    except ValueError as error:  # a value that a dataclass refuses
        fail(str(error))


def _file(path: list[str]) -> list[str]:
    """A YAML file as flags."""
    if not path or not Path(path[0]).is_file():
        fail(f"--config needs the path of a YAML file (as a run writes it to its config.yaml); got {path or 'nothing'}")
    try:
        tree = yaml.safe_load(Path(path[0]).read_text())
    except yaml.YAMLError as error:
        fail(f"--config {path[0]} is not YAML: {error}")
    if not isinstance(tree, dict):
        fail(f"--config {path[0]} must hold names with values, as a run's config.yaml does")
    return _flags(tree)


def dump(config: Config[Any, Any]) -> str:
    """The resolved configuration as YAML that `--config` reads back."""
    tree = dataclasses.asdict(config)
    tree |= tree.pop("train")
    return f"# {type(config.method).__name__}\n{yaml.safe_dump(_plain(tree), sort_keys=False)}"


def revived(kind: type[T], tree: dict[str, Any]) -> T:
    """A dataclass from the part of a run's config.yaml that holds it."""
    made: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    nested = {k: revived(made[k], v) if isinstance(v, dict) else v for k, v in tree.items() if k in made}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in nested.items()})


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
