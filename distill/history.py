"""The record of a run's configurations: config.yaml holds the current values, history.jsonl every change.

A line of history.jsonl is a JSON object. "step" is the first iteration of the configuration, "time" its date and time.
"from" is the checkpoint that was resumed. "method" and "config" are the configuration. "teacher" holds the teacher's
name and a digest of each component. "times" are the times of the student's calls.
A resumed run with another method, teacher, seed, batch or other times is refused unless --resume_allow names it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.configuration import Config, D, M, current_classes, dump, escape_for_terminal, read_run_config
from distill.files import read_text, write_atomically
from distill.method import Method, Requirement

FILE = "history.jsonl"
FIELDS = {  # kind of difference that stops a resumed run -> its fields in a configuration
    "seed": ("seed",),
    "batch": ("train_batch_size",),
    "times": tuple(f"student.{name}" for name in ("steps", "sigma", "timestep", "times", "scale", "renoise")),
}
OWN = ("output_dir", "resume_from_checkpoint", "resume_allow", "replay")  # fields of one command, not of the run


def name(method: object) -> str:
    """The class of a method and of the methods that it wraps: RewardGuided(SiD)."""
    wrapped = [name(value) for value in vars(method).values() if isinstance(value, Method)]
    return f"{type(method).__name__}({', '.join(wrapped)})" if wrapped else type(method).__name__


def entry(config: Config[M, D]) -> dict[str, Any]:
    """The entry of a configuration in the history."""
    return {"method": name(config.method), "config": yaml.safe_load(dump(config))}


def last_entry(run: Path) -> dict[str, Any] | None:
    """The newest entry of a run's history; without a history its config.yaml; None if there is neither."""
    if entries := _entries(run):
        return entries[-1]
    if not (run / "config.yaml").is_file():
        return None
    try:
        _, method, tree = read_run_config(run)
    except ValueError as error:
        raise ValueError(f"{error}; or remove it, and nothing is compared") from None
    return {"step": 0, "method": method, "config": tree}


def check_same_run(
    checkpoint: Path,
    before: dict[str, Any],
    now: dict[str, Any],
    requirements: Sequence[Requirement],
    allowed: Sequence[str],
) -> None:
    """ValueError if method, seed, batch or calls differ from the checkpoint's run, except for kinds in `allowed`."""
    old = flatten(before["config"])
    new = flatten(now["config"])
    changed = {kind: [f for f in names if f in old and old[f] != new.get(f)] for kind, names in FIELDS.items()}
    said = {
        kind: [f"{f} {_shorten(old[f])}, not {_shorten(new.get(f))}" for f in names] for kind, names in changed.items()
    }
    then = before["method"]
    this = now["method"]
    recorded = "time" in before
    if not recorded:  # config.yaml names only the outer class
        this = this.partition("(")[0]
    if then != this:
        said["method"] = [f"method {then}, not {this}"]
    if Requirement.EXPORTED_TEACHER in requirements and not recorded:  # config.yaml holds the teacher's times
        said.pop("times")
    check_allowed(checkpoint, said, allowed)


def check_allowed(checkpoint: Path, said: dict[str, list[str]], allowed: Sequence[str]) -> None:
    """ValueError that lists all differences of kinds that are not in `allowed`."""
    kinds = [kind for kind, words in said.items() if words and kind not in allowed]
    if kinds:
        differences = "; ".join(word for kind in kinds for word in said[kind])
        raise ValueError(
            f"{checkpoint} was trained with {differences}: this would be a different run. Use the old "
            f"values, choose another --output_dir, or allow the change with --resume_allow {' '.join(kinds)}"
        )


def check_same_teacher(
    checkpoint: Path, before: dict[str, Any], teacher: dict[str, Any], allowed: Sequence[str]
) -> None:
    """ValueError if the teacher's weights differ from the checkpoint's run; the folder may differ."""
    old = before.get("teacher", {}).get("digests")
    new = teacher["digests"]
    if old is None:
        sys.stderr.write(f"{checkpoint}: its teacher was not recorded, so the teachers' weights are not compared\n")
        return
    parts = [part for part in sorted({*old, *new}) if old.get(part) != new.get(part)]
    was = f"another teacher ({_shorten(before['teacher'].get('name'))}; other: {', '.join(parts)})"
    check_allowed(checkpoint, {"teacher": [was] if parts else []}, allowed)


def check_same_times(checkpoint: Path, before: dict[str, Any], times: Sequence[float], allowed: Sequence[str]) -> None:
    """ValueError if the student's call times differ from the checkpoint's run."""
    old = before.get("times", [*times])
    check_allowed(
        checkpoint, {"times": [f"calls at the times {old}, not {[*times]}"] if old != [*times] else []}, allowed
    )


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences of two entries, one per line; "" if they are equal."""
    old = flatten(before["config"])
    new = flatten(now["config"])
    lines = []
    if "time" in before and before["method"] != now["method"]:
        lines.append(f"  method: {before['method']} -> {now['method']}")
    names = [name for name in {**old, **new} if name not in OWN and old.get(name) != new.get(name)]
    lines += [
        f"  {name}: {_shorten(old[name])} -> {_shorten(new[name])}" for name in names if name in old and name in new
    ]
    lines += [f"  {name}: not set -> {_shorten(new[name])}" for name in names if name not in old]
    lines += [f"  {name}: {_shorten(old[name])} -> not set" for name in names if name not in new]
    return "".join(f"{line}\n" for line in lines)


def record(out: Path, entry: dict[str, Any], text: str, step: int, resumed: Path | None) -> None:
    """Append an entry to a run's history if it differs from the last one, then write config.yaml."""
    entries = _entries(out)
    if not entries:
        try:
            entries = [one for one in [last_entry(out)] if one is not None]
        except ValueError as error:
            sys.stderr.write(f"{error}. It is written anew\n")
    if not entries or _comparison_key(entries[-1]) != _comparison_key(entry):
        facts = {"step": step, "time": time.strftime("%F %T%z"), "from": resumed and str(resumed)}
        write_atomically(out / FILE, "".join(f"{json.dumps(one)}\n" for one in [*entries, facts | entry]))
    write_atomically(out / "config.yaml", text)


def _comparison_key(entry: dict[str, Any]) -> tuple[object, ...]:
    """The parts of an entry that are compared with the previous one."""
    config = {key: value for key, value in flatten(entry["config"]).items() if key not in OWN}
    return config, *(entry.get(key) for key in ("method", "teacher", "times"))


def _entries(run: Path) -> list[dict[str, Any]]:
    """The history of a run, oldest first; ValueError names a damaged line."""
    path = run / FILE
    entries = []
    if not path.is_file():
        return []
    for i, line in enumerate(read_text(path).splitlines(), 1):
        try:
            one = json.loads(line)
            flatten(one["config"])
            one["method"] = current_classes(one["method"])
            whole = isinstance(one.get("teacher", {}), dict)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is damaged in line {i}: delete that line")
        entries.append(one)
    return entries


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{dotted name: value}."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _shorten(value: object) -> str:
    return escape_for_terminal(str(value)[:80])
