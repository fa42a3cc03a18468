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
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from eval.files import store
from eval.jobs import Job, run
from eval.report import Row, checked, mean

LISTS = ("steps", "guidance", "protocols", "seeds")


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
        from eval.generate import model_hash

        here = [Path(path) for path in (self.model, self.base) if path and Path(path).exists()]
        return json.loads(json.dumps(asdict(self))) | {"weights": model_hash(*here) if here else None}

    def jobs(self, folder: Path) -> dict[str, Job]:
        """generate for every seed, then score: each stage leaves what is done as it is."""
        name, todo = self.title, {}
        launch = ["-m", "accelerate.commands.launch", *self.launch.split()] if self.launch else []
        for seed in self.seeds:
            command = [*launch, *self.sampling(folder, seed)]
            todo[f"{name}-{seed}"] = Job(f"sample {name}, seed {seed}", command)
        asked = {"folder": [folder / f"images-{seed}" for seed in self.seeds], "out": folder / "rows.json"}
        todo[name] = Job(f"score {name}", ["-m", "eval.score", *flags(asked | dict(self.score))], tuple(todo))
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
        return ["-m", "eval.generate", "--overwrite", *flags(asked)]


def flags(given: Mapping[str, Any]) -> list[str]:
    """Names with values as words of a command line; None is left out."""
    words: list[str] = []
    for key, value in given.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no_{key}")
        elif value is not None:
            words += [f"--{key}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return words


def entries(tree: Mapping[str, Any]) -> list[Entry]:
    """The product of models x steps x guidance x protocols. ValueError for what is no board, before any work."""
    known = {f.name for f in fields(Entry)} - {"protocol"} | {"protocols"}
    shared = {key: value for key, value in tree.items() if key not in ("out", "workers", "entries")}
    listed = tree.get("entries")
    if not isinstance(listed, list) or not listed:
        raise ValueError("a board needs a list `entries`, each with at least a model; see python -m eval.leaderboard")
    found = []
    for i, one in enumerate(listed):
        if not isinstance(one, dict) or not one.get("model", shared.get("model")):
            raise ValueError(f"entry {i} of the board is {one!r}; it needs at least a model")
        whole = shared | one
        if wrong := sorted(whole.keys() - known):
            raise ValueError(f"entry {i}, {whole['model']}, has {wrong[0]!r}; it may have {', '.join(sorted(known))}")
        many = {key: _list(whole.pop(key, None)) for key in LISTS}
        path = Path(str(whole["model"]))
        whole["name"] = str(whole.get("name") or (path.parent.name if path.name == "pipeline" else path.stem))
        for protocol in many["protocols"] or ["digits"]:
            seeds = tuple(many["seeds"]) or _seeds(protocol)
            for steps in many["steps"] or [None]:
                for guidance in many["guidance"] or [None]:
                    more = {"steps": steps, "guidance": guidance, "protocol": protocol, "seeds": seeds}
                    found.append(Entry(**whole, **more))
    titles = [entry.title for entry in found]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"two entries of the board are called {twice[0]}; give one of them another name")
    return found


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _seeds(protocol: str) -> tuple[int, ...]:
    """A protocol's seeds; of one that is unknown any, for its entry fails and says so."""
    from eval.protocols import PROTOCOLS

    return PROTOCOLS[protocol].seeds if protocol in PROTOCOLS else (0,)


def read(path: Path) -> dict[str, Any]:
    """A board's file. ValueError where it is absent or no YAML of names."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; write a board as the top of eval/entries.py shows it")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold names with values: entries, out, workers ...")
    return tree


def evaluate(todo: Sequence[Entry], out: Path, workers: int = 1, cost: bool = True) -> tuple[list[Row], dict[str, str]]:
    """(a row an entry that went well, {entry: why} of the others).

    What was done for the same request is kept, and an interrupted entry goes on where it was; a process that is killed
    is started again. Costs are measured at the end, one at a time.
    """
    folders = {e.title: out / "entries" / e.title for e in todo}
    requests = {e.title: e.request() for e in todo}
    stages = {e.title: e.jobs(folders[e.title]) for e in todo}
    left = [name for name in stages if stored(folders[name] / "done.json") != requests[name]]
    jobs = {stage: job for name in left for stage, job in stages[name].items()}
    failed = run(jobs, out, workers, patient=True) if jobs else {}
    timed = {f"{e.title}-cost": e.cost(folders[e.title]) for e in todo if e.title in left and e.title not in failed}
    failed |= run(timed, out, 1, patient=True) if cost and timed else {}
    rows: list[Row] = []
    why: dict[str, str] = {}
    for name, folder in folders.items():
        if wrong := [failed[stage] for stage in (*stages[name], f"{name}-cost") if stage in failed]:
            why[name] = wrong[0]
            continue
        (row,) = mean(checked(stored(folder / "rows.json"), str(folder / "rows.json")))
        measured = (stored(folder / "cost.json") or {}) if cost else {}
        rows.append({**row, "cost": {**(row.get("cost") or {}), **measured}})
        store(folder / "done.json", requests[name])
    return rows, why


def stored(path: Path) -> Any:
    """The JSON of a file; None where it is absent or broken."""
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
        return None
