"""board.yaml -> rows: many models x steps x guidance x protocols as one job that can be stopped and started again.

out: runs/board                # the folder of everything
workers: 2                     # jobs side by side, one thread each
protocols: [digits]            # keys beside `entries` are the defaults of every entry
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
from pathlib import Path
from typing import Any

from distill.files import read_yaml
from distill.layout import module_name
from eval.files import read_json, shorten, write_json
from eval.images.images import is_count, is_finite
from eval.leaderboard.jobs import Job, run_jobs
from eval.leaderboard.tables import Row, average_seeds, validate_rows
from eval.sampling.generate import model_hash, model_name

LISTS = ("steps", "guidance", "protocols", "seeds")
MOST = 10_000  # entries of a board


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_flags(value: Any) -> bool:
    """Whether a value maps names to plain values or lists of them, as flags can."""
    plain = (str, int, float, bool, type(None))
    return isinstance(value, dict) and all(
        isinstance(key, str) and all(isinstance(one, plain) for one in _list(given)) for key, given in value.items()
    )


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {  # of an entry, or of each value of a list: check and kind
    "steps": (is_count, "a whole number from 1"),
    "guidance": (is_finite, "a finite number"),
    "seeds": (lambda value: type(value) is int and value >= 0, "a whole number from 0"),
    "n": (is_count, "a number of images"),
    **dict.fromkeys(("generate", "score"), (_are_flags, "names with plain values")),
    **dict.fromkeys(("model", "name", "protocols", "base", "launch"), (_is_text, "text")),
}
BOARD: dict[str, tuple[Callable[[Any], bool], str]] = {  # beside the entries
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
    generate: Mapping[str, Any] = field(default_factory=dict)
    score: Mapping[str, Any] = field(default_factory=dict)
    launch: str = ""

    @property
    def title(self) -> str:
        """What its folder, its logs and messages call it."""
        parts = [self.name, f"{self.steps}-steps" if self.steps else "", self.protocol]
        parts.insert(2, "" if self.guidance is None else f"guidance-{self.guidance:g}")
        return re.sub(r"[^\w.-]+", "_", "-".join(filter(None, parts)))

    def request(self) -> dict[str, Any]:
        """All that its row depends on; the model by its weights where it is here."""
        here = [Path(path) for path in (self.model, self.base) if path and Path(path).exists()]
        return json.loads(json.dumps(asdict(self))) | {"weights": model_hash(*here) if here else None}

    def jobs(self, folder: Path) -> dict[str, Job]:
        """generate for every seed, then score: each stage leaves what is done as it is."""
        name = self.title
        todo = {}
        launch = ["-m", "accelerate.commands.launch", *self.launch.split()] if self.launch else []
        for seed in self.seeds:
            command = [*launch, *self.sampling(folder, seed)]
            todo[f"{name}-{seed}"] = Job(f"sample {name}, seed {seed}", command)
        asked = {"folder": [folder / f"images-{seed}" for seed in self.seeds], "out": folder / "rows.json"}
        command = ["-m", module_name("eval.score"), *command_line_flags(asked | dict(self.score))]
        todo[name] = Job(f"score {name}", command, tuple(todo))
        return todo

    def cost(self, folder: Path) -> Job:
        """Its latency and memory, in a process of its own that nothing runs beside."""
        command = self.sampling(folder, self.seeds[0])
        return Job(f"time {self.title}", [*command, "--cost", f"{folder / 'cost.json'}"])

    def sampling(self, folder: Path, seed: int) -> list[str]:
        """The command of its images of one seed."""
        where = {"model": self.model, "out": folder / f"images-{seed}", "name": self.name, "seed": seed}
        how = {"steps": self.steps, "guidance": self.guidance, "n": self.n, "base": self.base}
        asked = where | {"protocol": self.protocol} | how | dict(self.generate)
        return ["-m", module_name("eval.generate"), "--overwrite", *command_line_flags(asked)]


def command_line_flags(given: Mapping[str, Any]) -> list[str]:
    """Names with values as words of a command line; None is left out."""
    words: list[str] = []
    for key, value in given.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no_{key}")
        elif value is not None:
            words += [f"--{key}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return words


def list_entries(tree: Mapping[str, Any]) -> list[Entry]:
    """The product of models x steps x guidance x protocols. ValueError for what is no board, before any work."""
    known = {f.name for f in fields(Entry)} - {"protocol"} | {"protocols"}
    shared = {key: value for key, value in tree.items() if key not in ("out", "title", "workers", "entries")}
    listed = tree.get("entries")
    if not isinstance(listed, list) or not listed:
        raise ValueError("a board needs a list `entries`, each with at least a model; see python -m eval.leaderboard")
    for key, (right, kind) in BOARD.items():
        if tree.get(key) is not None and not right(tree[key]):
            raise ValueError(f"{key} of the board is {shorten(tree[key])}; it must be {kind}")
    found: list[Entry] = []
    for i, one in enumerate(listed):
        if not isinstance(one, dict) or not one.get("model", shared.get("model")):
            raise ValueError(f"entry {i} of the board is {shorten(one)}; it needs at least a model")
        whole = shared | one
        where = f"entry {i}, {whole['model']}"[:100]
        if wrong := sorted(map(str, whole.keys() - known)):
            raise ValueError(f"{where}, has {wrong[0]!r}; it may have {', '.join(sorted(known))}")
        for key, (right, kind) in FIELDS.items():
            values = _list(whole.get(key)) if key in LISTS else [whole.get(key)]
            if odd := [value for value in values if value is not None and not right(value)]:
                raise ValueError(f"{where}: {key} is {shorten(odd[0])}; it must be {kind}")
        many = {key: _list(whole.pop(key, None)) for key in LISTS}
        if len(found) + math.prod(len(values) or 1 for key, values in many.items() if key != "seeds") > MOST:
            raise ValueError(f"{where}: the board has more than {MOST:,} entries; write several boards")
        whole["name"] = whole.get("name") or model_name(Path(whole["model"]))
        for protocol in many["protocols"] or ["digits"]:
            seeds = tuple(many["seeds"]) or _seeds(protocol)
            for steps in many["steps"] or [None]:
                for guidance in many["guidance"] or [None]:
                    more = {"steps": steps, "guidance": guidance, "protocol": protocol, "seeds": seeds}
                    found.append(Entry(**whole, **more))
    titles = Counter(entry.title for entry in found)
    if twice := [title for title, count in titles.items() if count > 1]:
        raise ValueError(f"two entries of the board are called {twice[0]}; give one of them another name")
    return found


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _seeds(protocol: str) -> tuple[int, ...]:
    """A protocol's seeds; of one that is unknown any, for its entry fails and says so."""
    from eval.protocols import PROTOCOLS

    return PROTOCOLS[protocol].seeds if protocol in PROTOCOLS else (0,)


def read_board(path: Path) -> dict[str, Any]:
    """A board's file. ValueError where it is absent or no YAML of names."""
    if not path.exists():
        raise ValueError(f"there is no file {path}; write a board as the top of eval/leaderboard/entries.py shows it")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold names with values: entries, out, workers ...")
    return tree


def evaluate_entries(
    todo: Sequence[Entry], out: Path, workers: int = 1, cost: bool = True
) -> tuple[list[Row], dict[str, str]]:
    """(a row an entry, {entry: why} of those that failed; one that was scored without a metric is in both).

    What was done for the same request is kept, and an interrupted entry goes on where it was; a process that is killed
    is started again. Costs are measured at the end, one at a time.
    """
    folders = {e.title: out / "entries" / e.title for e in todo}
    requests = {e.title: e.request() for e in todo}
    seeds = {e.title: e.seeds for e in todo}
    stages = {e.title: e.jobs(folders[e.title]) for e in todo}
    left = [name for name in stages if read_json_or_none(folders[name] / "done.json") != requests[name]]
    for name in left:
        (folders[name] / "rows.json").unlink(missing_ok=True)  # of another request
    jobs = {stage: job for name in left for stage, job in stages[name].items()}
    failed = run_jobs(jobs, out, workers, patient=True) if jobs else {}
    timed = {f"{e.title}-cost": e.cost(folders[e.title]) for e in todo if e.title in left and e.title not in failed}
    failed |= run_jobs(timed, out, 1, patient=True) if cost and timed else {}
    rows: list[Row] = []
    why: dict[str, str] = {}
    for name, folder in folders.items():
        wrong = [stage for stage in (*stages[name], f"{name}-cost") if stage in failed]
        if wrong:
            why[name] = failed[wrong[0]]
        if wrong and wrong != [name]:
            continue
        try:
            row = read_mean_row(folder / "rows.json")
        except ValueError as error:  # of this entry: the others have their rows
            why.setdefault(name, str(error))
            continue
        if wrong and len(row.get("seeds") or ()) != len(seeds[name]):  # of some seeds alone
            continue
        measured = (read_json_or_none(folder / "cost.json") or {}) if cost else {}
        rows.append({**row, "cost": {**(row.get("cost") or {}), **measured}})
        if not wrong:
            write_json(folder / "done.json", requests[name])
    return rows, why


def read_mean_row(path: Path) -> Row:
    """The mean of the rows of a file, which differ in their seeds alone. ValueError for other ones."""
    found = average_seeds(validate_rows(read_json_or_none(path), str(path)))
    if len(found) > 1:
        raise ValueError(f"{path} holds rows of {len(found)} models or protocols, where one has several seeds")
    return found[0]


def read_json_or_none(path: Path) -> Any:
    """The JSON of a file; None where it is absent or broken."""
    try:
        return read_json(path, "")
    except ValueError:
        return None
