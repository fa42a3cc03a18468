"""The command line of a recipe, from its configuration dataclass. Heavy libraries load after the arguments are
valid."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

import tyro
import yaml

from distill.files import read_text, read_yaml
from distill.layout import program_name
from distill.ranges import Calls, Natural, Side, Weight, iterate_fields, validate_ranges
from distill.terminal import escape_for_terminal as escape_for_terminal
from distill.terminal import fail as fail
from distill.training.config import FakeConfig, StudentConfig, TrainConfig

M = TypeVar("M")
D = TypeVar("D")
T = TypeVar("T")
ALIASES = ("pretrained_model_name_or_path", "pretrained_teacher_model")
TEACHER = tyro.conf.arg(aliases=[f"--{name}" for name in ALIASES])
REMOVED = {  # fields of methods in earlier versions -> what holds now
    "phases": "the phases of PCM are the student's calls, --student.steps or --student.times",
    "places": "the heads of PCM have a logit for each place",
}
FORMER_CLASSES = {"Forgetting": "SFD", "Rewarded": "RewardGuided", "Proxied": "RGLCD"}  # of methods, in stored runs
TASKS = {  # the flags that a task needs, for --help
    "try the recipe": "smoke",
    "name teacher and data": "teacher data.cache data.images data.prompts resolution",
    "set length and batch": "max_train_steps train_batch_size learning_rate",
    "save memory": "gradient_checkpointing gradient_accumulation_steps optimizer student.lora.rank fake.lora.rank",
    "choose the precision": "mixed_precision",
    "go on with a run": "resume_from_checkpoint resume_allow checkpointing_steps config",
    "look at a run": "validation_steps validation_images validation_teacher_steps logging_steps report_to",
    "name the run for trackers": "tracker_project_name tracker_run_name",
    "find a NaN or a hang": "skip_nonfinite replay hang_seconds",
    "publish the student": "push_to_hub hub_model_id license",
}
LAUNCHER_FLAGS = (  # of `accelerate launch`, which people give to a recipe
    "config_file num_processes num_machines machine_rank main_process_ip main_process_port multi_gpu "
    "gpu_ids cpu use_fsdp fsdp_version use_deepspeed dynamo_backend rdzv_backend same_network"
).split()
WRITTEN = ("teacher", "method", "student", "output_dir", "seed")  # first and last fields of a run's config.yaml


@dataclass(frozen=True)
class Config(Generic[M, D]):
    """One experiment: the teacher, the student, the method and the training options."""

    method: M  # the method and its hyper-parameters
    data: D  # conditions and, if the method needs them, real images
    teacher: Annotated[str, TEACHER] = ""  # folder or Hub name of the teacher's diffusers pipeline
    revision: str | None = None  # revision of the teacher on the Hub
    variant: str | None = None  # variant of the teacher's weight files, for example fp16
    resolution: Side | None = None  # pixels per side; None: the teacher's training resolution
    frames: Calls | None = None  # number of frames of a video; None: the teacher's training length
    pag_scale: Weight = 0.0  # scale of the teacher's perturbed-attention guidance, beside the method's guidance; 0: off
    pag_layers: tuple[str, ...] = ("mid_block",)  # modules with perturbed self-attention (SANA: transformer_blocks.0)
    student: StudentConfig = field(default_factory=StudentConfig)
    fake: FakeConfig = field(default_factory=FakeConfig)
    train: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainConfig)
    validation_images: Calls = 8  # number of images per sample grid, from the data's first prompts
    validation_teacher_steps: Natural | None = None  # steps of the teacher's row in grids; 0: none; None: 25, videos 0
    push_to_hub: bool = False  # upload the verified export
    hub_model_id: str | None = None  # user/name of the repository; None: the name of output_dir
    hub_private: bool = False  # create the repository on the Hub as a private one
    license: str | None = None  # license of the student if the teacher's is unknown: apache-2.0 or NAME,URL
    family: str = "edm"  # family of the tiny random teacher of --smoke
    replay: str | None = None  # folder replay-STEP-PLAYER of a run: repeat that update; exit status 1: not finite again
    smoke: bool = False  # run two steps on a tiny random teacher, as a test


def parse(default: Config[M, D], argv: list[str] | None = None, doc: str | None = None) -> Config[M, D]:
    """The recipe's configuration, overridden by `--config file.yaml`, then by flags.

    For an unknown flag, a wrong type or an impossible value: one message that names it, and exit status 2.
    """
    argv = _expand_config(list(sys.argv[1:] if argv is None else argv), default)
    doc = f"{doc or ''}\n\n{describe_tasks(default)}"
    kind = Config.__class_getitem__((type(default.method), type(default.data)))  # type: ignore[attr-defined]
    cli = partial(
        tyro.cli, kind, default=default, args=argv, description=doc, use_underscores=True, prog=program_name()
    )
    try:
        config, unknown = cli(return_unknown_args=True)
        if unknown:
            _refuse_unknown(unknown[0], argv)
            _refuse_launcher_flag(unknown[0].removeprefix("--").partition("=")[0], default)
            cli()  # its error message names similar flags
        validate_ranges(config, "--")
    except ValueError as error:  # raised by a dataclass
        fail(str(error).removeprefix("--train."))
    return config


def _expand_config(argv: list[str], default: Config[M, D]) -> list[str]:
    """The command line with the flags of its --config file in front, or of the config.yaml of its --replay."""
    ours = ("--config=", "--replay=")
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith(ours) else [arg])]
    if "--replay" in argv[:-1] and "--config" not in argv:
        replay = argv[argv.index("--replay") + 1]
        if not os.path.isfile(f"{replay}/config.yaml"):
            fail(f"--replay is {replay!r}, which has no config.yaml: give a run's replay-STEP-PLAYER")
        argv += ["--config", f"{replay}/config.yaml"]
    if "--config" not in argv:
        return argv
    i = argv.index("--config")
    return _file(argv[i + 1 : i + 2], default) + argv[:i] + argv[i + 2 :]


def _refuse_unknown(word: str, argv: list[str]) -> None:
    """Refuse a value that no flag takes, and a flag of an earlier version."""
    if not word.startswith("--"):
        i = next(i for i, arg in enumerate(argv) if word in (arg, arg.partition("=")[2]))
        flag = next((arg.partition("=")[0] for arg in argv[i::-1] if arg.startswith("--")), "the command line")
        fail(f"{flag} takes no {word!r}: see --help")
    _refuse_removed_field(word.removeprefix("--").partition("=")[0], "the flag")


def _file(path: list[str], default: Config[M, D]) -> list[str]:
    """Convert a YAML file to flags."""
    if not path or not os.path.isfile(path[0]):
        fail(f"--config needs the path of a YAML file (as a run writes it to its config.yaml); got {path or 'nothing'}")
    try:
        tree = read_yaml(path[0])
    except ValueError as error:
        fail(f"--config {error}")
    if not isinstance(tree, dict):
        fail(f"--config {path[0]} must hold names with values, as a run's config.yaml does")
    fields = {name.removeprefix("train."): (hint, value) for name, hint, _, value in iterate_fields(default)}
    empty = {name for name, (_, value) in fields.items() if value is None}
    try:
        return _flags(tree, {name: hint for name, (hint, _) in fields.items()}, empty)
    except ValueError as error:  # an integer with more digits than Python prints
        fail(f"--config {path[0]}: {error}")


def read_run_config(run: Path) -> tuple[str, str, dict[str, Any]]:
    """(text, class of the method, values) of a run's config.yaml. ValueError if it is absent or damaged."""
    path = run / "config.yaml"
    tree = read_yaml(path)
    text = read_text(path)
    lacking = [name for name in WRITTEN if not isinstance(tree, dict) or name not in tree]
    nested = not lacking and all(isinstance(tree[name], dict) for name in ("method", "student"))
    if lacking or not nested or not (named := re.match(r"# (\w+)\n", text)):
        why = f"it has no {lacking[0]}" if lacking else "its first line, its method or its student is not that of a run"
        raise ValueError(f"{path} is truncated or damaged ({why}): restore it; exports and checkpoints have a copy")
    return text, current_classes(named[1]), tree


def current_classes(method: str) -> str:
    """Classes of a stored run, "Rewarded(SiD)" for example, by their names of today."""
    return re.sub(r"\w+", lambda word: FORMER_CLASSES.get(word[0], word[0]), method)


def dump(config: Config[M, D]) -> str:
    """The complete configuration as YAML, which `--config` reads."""
    tree = dataclasses.asdict(config)
    tree |= tree.pop("train")
    return f"# {type(config.method).__name__}\n{yaml.safe_dump(_plain(tree), sort_keys=False)}"


def from_tree(kind: type[T], tree: Mapping[str, object]) -> T:
    """A dataclass from its part of a run's config.yaml."""
    made: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    nested = {k: from_tree(made[k], v) if isinstance(v, dict) else v for k, v in tree.items() if k in made}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in nested.items()})


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _check_name(name: str, known: list[str], table: bool) -> None:
    """Refuse a name that is not a field, for example "help" and other flags of the command line."""
    if name in known or (table and any(one.startswith(f"{name}.") for one in known)):
        return
    _refuse_removed_field(name, "its line")
    near = difflib.get_close_matches(name, known, 1)
    fail(f"--config: there is no --{name[:200]}{f'; --{near[0]} is the nearest' if near else ''}; see --help")


def describe_tasks(default: Config[Any, Any]) -> str:
    """The flags of a recipe by task, and what --config does."""
    known = {"config", *_flag_names(default)}
    width = max(map(len, TASKS))
    tasks = {task: [f"--{name}" for name in names.split() if name in known] for task, names in TASKS.items()}
    lines = [f"{task:{width}}  {' '.join(flags)}" for task, flags in tasks.items()]
    return "\n".join(
        [
            "Flags by task:",
            "",
            *(f"    {line}" for line in lines),
            "",
            "--config FILE.yaml sets all values that the file holds, such as a run's config.yaml; flags go on top.",
        ]
    )


def _flag_names(default: Config[Any, Any]) -> list[str]:
    return [name.removeprefix("train.") for name, *_ in iterate_fields(default)]


def _refuse_launcher_flag(name: str, default: Config[Any, Any]) -> None:
    """Refuse a flag of `accelerate launch`, or one that is nearer to such a flag than to one of the recipe."""
    plain = name.replace("-", "_")
    near = difflib.get_close_matches(plain, [*_flag_names(default), *LAUNCHER_FLAGS], 1, 0.8)
    if near and near[0] in LAUNCHER_FLAGS:
        fail(
            f"--{name[:200]} is not a flag of the recipe; --{near[0]} is one of `accelerate launch`, and stands before "
            f"the recipe: accelerate launch --{near[0]} ... {program_name()} ..."
        )


def _refuse_removed_field(name: str, what: str) -> None:
    """Refuse a field that an earlier version had."""
    why = REMOVED.get(name.rpartition(".")[2]) if name.startswith("method.") else None
    if why:
        fail(f"there is no --{name} any more: {why}. Leave {what} out")


def _flags(tree: dict[str, object], known: dict[str, object], empty: set[str], prefix: str = "") -> list[str]:
    """Convert a tree of values to flags. Values that a flag cannot express are refused.

    known: the type of every field by its name. empty: the fields that are None in the recipe. A null for these is
    ignored, because some have no flag (a law or None).
    """
    flags: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        _check_name(name, [*known, *ALIASES], isinstance(value, dict))
        if isinstance(value, dict) and name not in known:
            flags += _flags(value, known, empty, f"{name}.")
        elif value is not None or name not in empty:
            flags += _flag(name, value, known.get(name))
    return flags


def _flag(name: str, value: object, hint: object) -> list[str]:
    """One value as a flag. hint: the type of its field; None: the name is an alias, whose value is passed on."""
    kinds = {get_origin(kind) or kind for kind in (hint, *get_args(hint))}
    if isinstance(value, bool) and bool in kinds:
        parent, dot, key = name.rpartition(".")
        return [f"--{name}" if value else f"--{parent}{dot}no_{key}"]
    if isinstance(value, list) and tuple in kinds:
        words = value
    else:
        words = [] if value is None else [value]
    if hint is not None:
        _check_value(name, value, words, kinds)
    return [f"--{name}", *map(str, words or [value] * (value is None))]


def _check_value(name: str, value: object, words: list[object], kinds: set[object]) -> None:
    """Refuse a value that is not of its field's kinds. words: the value as words of the command line."""
    odd = any(isinstance(v, bool | list | dict | None) or f"{v}".startswith("--") for v in words)
    if not odd and bool not in kinds and (value is not None or type(None) in kinds):
        return
    may = "one value"
    if bool in kinds or tuple in kinds:
        may = "true or false" if bool in kinds else "a list of plain values"
    fail(f"--config: {name} is {value!r}; it must be {may}{', or null' * (type(None) in kinds)}")
