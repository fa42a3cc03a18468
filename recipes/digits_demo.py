"""The main job, end to end: a teacher on handwritten digits, one-step students, evaluation, a report page.

Trains everything from scratch, side by side, one thread each; reads no stored weights and needs no network.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from distill.config import fail
from eval.jobs import Job, recipe, run

RECIPES = Path(__file__).resolve().parent
TEACHER = {"teacher-9": "5", "teacher-17": "9", "teacher-35": "18"}  # network calls: steps of Heun's method


@dataclass(frozen=True)
class Demo:
    """What to run."""

    output_dir: str = "runs/demo"
    methods: tuple[str, ...] = ("dmd2", "sid")  # recipes/NAME_digits.py
    n: int = 2000  # images of every evaluation
    seed: int = 0  # of everything that is trained
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)  # jobs side by side, one thread each


def jobs(cfg: Demo, out: Path) -> dict[str, Job]:
    """Everything up to the samples of every model."""

    def sample(name: str, model: Path, *flags: str, after: str) -> Job:
        where = ["--model", f"{model}", "--out", f"{out / 'samples' / name}", "--name", after, "--n", f"{cfg.n}"]
        return Job(f"sample {name}", ["-m", "eval.generate", *where, *flags], (after,))

    seed = ("--seed", f"{cfg.seed}")
    given = (*seed, "--teacher", f"{out / 'teacher'}")
    classifier = ["-c", "from eval.digits import classifier; classifier()"]
    todo = {
        "teacher": recipe(RECIPES / "digits_teacher.py", "train the teacher", out / "teacher", *seed),
        "features": Job("train the feature classifier", classifier),
    }
    for m in cfg.methods:
        title = f"distil {m} to one step"
        todo[m] = recipe(RECIPES / f"{m}_digits.py", title, out / m, *given, after=("teacher",))
    for name, steps in TEACHER.items():
        todo[name] = sample(name, out / "teacher", "--steps", steps, after="teacher")
    for m in cfg.methods:
        todo[f"{m}-1"] = sample(f"{m}-1", out / m / "pipeline", after=m)
    return todo


def main(cfg: Demo) -> None:
    began, out = time.perf_counter(), Path(cfg.output_dir)
    missing = [m for m in cfg.methods if not (RECIPES / f"{m}_digits.py").is_file()]
    if missing:
        fail(f"no recipe for {missing}; there are {sorted(p.stem[:-7] for p in RECIPES.glob('*_digits.py'))}")
    if out.exists() and not (out / "demo.json").is_file():
        fail(f"{out} exists and is not an earlier demo: choose another --output_dir")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "demo.json").write_text(json.dumps({"methods": cfg.methods, "n": cfg.n, "seed": cfg.seed}))
    try:
        run(jobs(cfg, out), out, cfg.workers)
    except RuntimeError as error:
        fail(str(error))

    os.environ["DISTILL_CACHE"] = f"{out / 'cache'}"
    from eval.report import write
    from eval.score import scores

    shown = {name: out / "samples" / name for name in (*TEACHER, *(f"{m}-1" for m in cfg.methods))}
    rows = scores(tuple(shown.values()))
    for row in rows:
        log = out / row["model"] / "log.jsonl"
        row["train_seconds"] = json.loads(log.read_text().splitlines()[-1])["seconds"]
    logs = {name: out / name / "log.jsonl" for name in ("teacher", *cfg.methods)}
    page = write(out, rows, rows[0]["floor_fd_heldout"], logs, shown, time.perf_counter() - began)
    show(page, cfg)


def show(page: Path, cfg: Demo) -> None:
    """The table in the terminal, where the page is, and what to run next."""
    from rich.console import Console

    from eval.report import table

    report: dict[str, Any] = json.loads((page.parent / "report.json").read_text())
    student, teacher = page.parent / cfg.methods[0] / "pipeline", page.parent / "teacher"
    lines = [
        f"\n{page} has the pictures, the curves and every number: open it in a browser (xdg-open {page}).",
        f"{student} is a plain diffusers pipeline. What to run next:",
        f"  python -m eval.generate --model {student} --n 100 --out runs/images",
        *(
            f"  accelerate launch recipes/{m}_digits.py --teacher {teacher} --output_dir runs/digits/{m}"
            for m in ("vsd", "lcd", "scm")
        ),
    ]
    console = Console()
    console.print(table(report["rows"], report["floor"]))
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Demo, use_underscores=True, description=__doc__))
