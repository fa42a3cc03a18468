"""board.yaml -> rows: many models x steps x guidance x protocols as one job that can be stopped and started again.

Paths are relative to the folder in which the command is run.

out: runs/board                # the folder of everything
workers: 2                     # jobs side by side, one thread each
protocols: [digits]            # names or .yaml files; keys beside `entries` are the defaults of every entry
reference: photos              # real images, instead of the protocol's
entries:
  - model: runs/teacher        # what eval.generate takes: folder, Hub name, or a LoRA's file with `base`
    steps: [5, 9, 18]
  - model: runs/dmd2/pipeline
    name: dmd2
    guidance: [1]
    seeds: [0, 1, 2]           # of the noise; by default the protocol's
    generate: {dtype: bfloat16}                  # further flags of eval.generate
    score: {use: "inception-clean=..."}          # and of eval.score
    launch: --num_processes 8                    # of accelerate launch, for eval.generate
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from distill.files import read_yaml
from distill.layout import module_name
from eval.files import list_names, read_json, shorten, write_json
from eval.images.manifest import is_count, is_finite
from eval.leaderboard.jobs import Job, run_jobs
from eval.leaderboard.tables import Row, average_seeds, validate_rows
from eval.protocol_files import is_file_name
from eval.protocols import find_protocol
from eval.sampling.models import model_hash, model_name

LISTS = ("steps", "guidance", "protocols", "seeds")
MOST = 10_000  # entries of a board
Flags = dict[str, Any]  # of a command, by their names
Tree = Mapping[str, Any]  # of a YAML file


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _are_flags(value: object) -> bool:
    """Whether a value maps names to plain values or to lists of plain values."""
    plain = (str, int, float, bool, type(None))
    return isinstance(value, dict) and all(
        isinstance(key, str) and all(isinstance(one, plain) for one in _list(content)) for key, content in value.items()
    )


FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {  # of an entry, or of each value of a list: check and kind
    "steps": (is_count, "a whole number from 1"),
    "guidance": (is_finite, "a finite number"),
    "seeds": (lambda value: type(value) is int and value >= 0, "a whole number from 0"),
    "n": (is_count, "a number of images"),
    **dict.fromkeys(("generate", "score"), (_are_flags, "names with plain values")),
    **dict.fromkeys(("model", "name", "protocols", "base", "launch", "reference"), (_is_text, "text")),
}
BOARD: dict[str, tuple[Callable[[object], bool], str]] = {  # beside the entries
    **dict.fromkeys(("out", "title"), (_is_text, "text")),
    "workers": (is_count, "a number"),
}


@dataclass(frozen=True)
class Entry:
    """One model, one number of steps, one guidance, one protocol: one row of the board."""

    model: str
    name: str = ""
    steps: int | None = None
    guidance: float | None = None
    protocol: str = "digits"
    seeds: tuple[int, ...] = (0,)
    n: int | None = None
    base: str | None = None
    reference: str | None = None  # folder or .npz of real images, instead of the protocol's
    generate: Flags = field(default_factory=dict)
    score: Flags = field(default_factory=dict)
    launch: str = ""

    @property
    def title(self) -> str:
        """The name of the entry in its folder, its logs and messages."""
        protocol = Path(self.protocol).stem if is_file_name(self.protocol) else self.protocol
        parts = [self.name, f"{self.steps}-steps" if self.steps else "", protocol]
        parts.insert(2, "" if self.guidance is None else f"guidance-{self.guidance:g}")
        return re.sub(r"[^\w.-]+", "_", "-".join(filter(None, parts)))

    def request(self) -> dict[str, object]:
        """The inputs of the row. A local model is identified by its weights."""
        local_files = [Path(path) for path in (self.model, self.base) if path and Path(path).exists()]
        request = json.loads(json.dumps(asdict(self))) | {"weights": model_hash(*local_files) if local_files else None}
        if self.reference is None:
            del request["reference"]  # boards of earlier versions have none
        if is_file_name(self.protocol):
            request["protocol_hash"] = find_protocol(self.protocol).hash
        return request

    def jobs(self, folder: Path) -> dict[str, Job]:
        """The jobs: generate for every seed, then score. Each stage keeps its finished results."""
        name = self.title
        todo = {}
        launch = ["-m", "accelerate.commands.launch", *self.launch.split()] if self.launch else []
        for seed in self.seeds:
            command = [*launch, *self.sampling(folder, seed)]
            todo[f"{name}-{seed}"] = Job(f"sample {name}, seed {seed}", command)
        options: Flags = {"folder": [folder / f"images-{seed}" for seed in self.seeds], "out": folder / "rows.json"}
        options["reference"] = self.reference
        command = ["-m", module_name("eval.score"), *command_line_flags(options | dict(self.score))]
        todo[name] = Job(f"score {name}", command, tuple(todo))
        return todo

    def cost(self, folder: Path) -> Job:
        """The job that measures latency and memory. It must run alone."""
        command = self.sampling(folder, self.seeds[0])
        return Job(f"time {self.title}", [*command, "--cost", f"{folder / 'cost.json'}"])

    def sampling(self, folder: Path, seed: int) -> list[str]:
        """The command that generates the images of one seed."""
        where = {"model": self.model, "out": folder / f"images-{seed}", "name": self.name, "seed": seed}
        how = {"steps": self.steps, "guidance": self.guidance, "n": self.n, "base": self.base}
        options = where | {"protocol": self.protocol} | how | dict(self.generate)
        return ["-m", module_name("eval.generate"), "--overwrite", *command_line_flags(options)]


def command_line_flags(options: Flags) -> list[str]:
    """The words of a command line for names with values. None is left out."""
    words: list[str] = []
    for key, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no_{key}")
        elif value is not None:
            words += [f"--{key}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return words


def list_entries(tree: Tree) -> list[Entry]:
    """The product of models x steps x guidance x protocols. ValueError for an invalid board, before any work."""
    shared = {key: value for key, value in tree.items() if key not in ("out", "title", "workers", "entries")}
    _validate_board(tree)
    entries: list[Entry] = []
    for i, one in enumerate(tree["entries"]):
        if not isinstance(one, dict) or not one.get("model", shared.get("model")):
            raise ValueError(f"entry {i} of the board is {shorten(one)}; it needs at least a model")
        values = {**shared, **one}
        where = f"entry {i}, {values['model']}"[:100]
        _validate_entry(values, where)
        lists = {key: _list(values.pop(key, None)) for key in LISTS}
        if len(entries) + math.prod(len(lists[key]) or 1 for key in ("steps", "guidance", "protocols")) > MOST:
            raise ValueError(f"{where}: the board has more than {MOST:,} entries; write several boards")
        values["name"] = values.get("name") or model_name(Path(values["model"]))
        entries += _product(values, lists)
    titles = Counter(entry.title for entry in entries)
    if repeated := [title for title, count in titles.items() if count > 1]:
        raise ValueError(f"two entries of the board are called {repeated[0]}; give one of them another name")
    return entries


def _validate_board(tree: Tree) -> None:
    """ValueError for a board without entries, and for keys beside them of a wrong kind."""
    listed = tree.get("entries")
    if not isinstance(listed, list) or not listed:
        raise ValueError("a board needs a list `entries`, each with at least a model; see python -m eval.leaderboard")
    for key, (is_valid, kind) in BOARD.items():
        if tree.get(key) is not None and not is_valid(tree[key]):
            raise ValueError(f"{key} of the board is {shorten(tree[key])}; it must be {kind}")


def _validate_entry(values: Tree, where: str) -> None:
    """ValueError for a key that an entry does not have, and for a value of a wrong kind."""
    known = {f.name for f in fields(Entry)} - {"protocol"} | {"protocols"}
    if unknown := sorted(map(str, values.keys() - known)):
        raise ValueError(f"{where}, has {unknown[0]!r}; {list_names(unknown[0], sorted(known))}")
    for key, (is_valid, kind) in FIELDS.items():
        listed = _list(values.get(key)) if key in LISTS else [values.get(key)]
        if invalid := [value for value in listed if value is not None and not is_valid(value)]:
            raise ValueError(f"{where}: {key} is {shorten(invalid[0])}; it must be {kind}")


def _product(values: Tree, lists: Mapping[str, list[Any]]) -> list[Entry]:
    """The entries of one model: protocols x steps x guidance."""
    entries = []
    for protocol, steps, guidance in product(
        lists["protocols"] or ["digits"], lists["steps"] or [None], lists["guidance"] or [None]
    ):
        seeds = tuple(lists["seeds"]) or find_protocol(protocol).seeds
        entries.append(Entry(**values, steps=steps, guidance=guidance, protocol=protocol, seeds=seeds))
    return entries


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def read_board(path: Path) -> Tree:
    """The tree of a board's file. ValueError if the file is absent or holds no mapping."""
    if not path.exists():
        raise ValueError(f"there is no file {path}; write a board as the top of eval/leaderboard/entries.py shows it")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold names with values: entries, out, workers ...")
    return tree


def evaluate_entries(
    todo: Sequence[Entry], out: Path, workers: int = 1, cost: bool = True
) -> tuple[list[Row], dict[str, str]]:
    """(a row for each entry, {entry: reason} of the failed ones; an entry that was scored without a metric is in both).

    Results of the same request are kept, and an interrupted entry continues. A process that is killed is started again.
    Costs are measured at the end, one at a time.
    """
    runs = {entry.title: EntryRun(entry, out) for entry in todo}
    unfinished = [run for run in runs.values() if not run.is_done()]
    for run in unfinished:
        run.remove_old_rows()
    jobs = {stage: job for run in unfinished for stage, job in run.jobs.items()}
    failed = run_jobs(jobs, out, workers, patient=True) if jobs else {}
    if cost:
        timed = {run.cost_stage: run.entry.cost(run.folder) for run in unfinished if run.entry.title not in failed}
        failed |= run_jobs(timed, out, 1, patient=True) if timed else {}
    return _collect_rows(runs, failed, cost)


def _collect_rows(
    runs: Mapping[str, EntryRun], failed: Mapping[str, str], cost: bool
) -> tuple[list[Row], dict[str, str]]:
    """(the rows of the entries, {entry: reason} of the failed ones)."""
    rows: list[Row] = []
    reasons: dict[str, str] = {}
    for name, run in runs.items():
        if stages := run.failed_stages(failed):
            reasons[name] = failed[stages[0]]
        try:
            row = run.read_row(failed, cost)
        except ValueError as error:  # of this entry: the others have their rows
            reasons.setdefault(name, str(error))
            continue
        if row is not None:
            rows.append(row)
    return rows, reasons


class EntryRun:
    """The folder and the jobs of an entry of a board."""

    def __init__(self, entry: Entry, out: Path) -> None:
        self.entry = entry
        self.folder = out / "entries" / entry.title
        self.request = entry.request()
        self.jobs = entry.jobs(self.folder)
        self.cost_stage = f"{entry.title}-cost"

    def is_done(self) -> bool:
        return read_json_or_none(self.folder / "done.json") == self.request

    def remove_old_rows(self) -> None:
        """Remove the rows of another request."""
        (self.folder / "rows.json").unlink(missing_ok=True)

    def failed_stages(self, failed: Mapping[str, str]) -> list[str]:
        return [stage for stage in (*self.jobs, self.cost_stage) if stage in failed]

    def read_row(self, failed: Mapping[str, str], cost: bool) -> Row | None:
        """The entry's row; None if a stage failed that the row needs. ValueError if the file holds no row."""
        stages = self.failed_stages(failed)
        if stages and stages != [self.entry.title]:
            return None
        row = read_mean_row(self.folder / "rows.json")
        if stages and len(row.get("seeds") or ()) != len(self.entry.seeds):  # of some seeds alone
            return None
        measured = (read_json_or_none(self.folder / "cost.json") or {}) if cost else {}
        if not stages:
            write_json(self.folder / "done.json", self.request)
        return {**row, "cost": {**(row.get("cost") or {}), **measured}}


def read_mean_row(path: Path) -> Row:
    """The mean of the rows of a file. ValueError if they differ in more than their seeds."""
    rows = average_seeds(validate_rows(read_json_or_none(path), str(path)))
    if len(rows) > 1:
        raise ValueError(f"{path} holds rows of {len(rows)} models or protocols, where one has several seeds")
    return rows[0]


def read_json_or_none(path: Path) -> Any:
    """The value of a JSON file; None if the file is absent or damaged."""
    try:
        return read_json(path, "")
    except ValueError:
        return None
