"""The main job, end to end: a teacher on handwritten digits, one-step students, evaluation, a report page.

Trains everything from scratch, side by side, one thread each; reads no stored weights and needs no network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
import yaml

from distill.config import fail

RECIPES = Path(__file__).resolve().parent
LAUNCH = "accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
TEACHER = {"teacher-9": "heun 5", "teacher-17": "heun 9", "teacher-35": "heun 18"}  # network calls: solver, steps


@dataclass(frozen=True)
class Demo:
    """What to run."""

    output_dir: str = "runs/demo"
    methods: tuple[str, ...] = ("dmd2", "sid")  # recipes/NAME_digits.py
    n: int = 2000  # images of every evaluation
    seed: int = 0  # of everything that is trained
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)  # jobs side by side, one thread each


@dataclass
class Job:
    """A command in a process of its own, after others."""

    title: str
    command: list[str]
    after: tuple[str, ...] = ()
    log: Path | None = None  # log.jsonl of a training run: the source of its progress


def jobs(cfg: Demo, out: Path) -> dict[str, Job]:
    """Everything up to the score of every folder of samples."""

    def recipe(name: str, title: str, folder: str, *flags: str, after: tuple[str, ...] = ()) -> Job:
        target = ["--output_dir", f"{out / folder}", "--seed", f"{cfg.seed}"]
        command = ["-m", *LAUNCH.split(), "--num_cpu_threads_per_process", "1", f"{RECIPES / name}", *target, *flags]
        return Job(title, command, after, out / folder / "log.jsonl")

    def samples(name: str, model: Path, *flags: str, after: str) -> Job:
        where = ["--model", f"{model}", "--out", f"{out / 'samples' / name}", "--name", name, "--n", f"{cfg.n}"]
        return Job(f"sample {name}", ["-m", "eval.generate", *where, *flags], (after,))

    classifier = "from eval.features import extractor; extractor()"
    todo = {
        "teacher": recipe("digits_teacher.py", "train the teacher", "teacher"),
        "features": Job("train the feature classifier", ["-c", classifier]),
    }
    for m in cfg.methods:
        flags = ("--teacher", f"{out / 'teacher'}")
        todo[m] = recipe(f"{m}_digits.py", f"distil {m} to one step", m, *flags, after=("teacher",))
    for name, how in TEACHER.items():
        solver, steps = how.split()
        todo[name] = samples(name, out / "teacher", "--solver", solver, "--steps", steps, after="teacher")
    for m in cfg.methods:
        todo[f"{m}-1"] = samples(f"{m}-1", out / m / "pipeline", after=m)
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
    run(jobs(cfg, out), out, cfg.workers)

    from eval.report import write
    from eval.score import scores

    os.environ["DISTILL_CACHE"] = f"{out / 'cache'}"
    shown = {path.name: path for path in sorted((out / "samples").iterdir())}
    rows = scores(tuple(shown.values()))
    for row in rows:
        run_of = row["model"].rsplit("-", 1)[0]
        row["train_seconds"] = json.loads((out / run_of / "log.jsonl").read_text().splitlines()[-1])["seconds"]
    logs = {name: out / name / "log.jsonl" for name in ("teacher", *cfg.methods)}
    page = write(out, rows, rows[0]["floor_fd_heldout"], logs, shown, time.perf_counter() - began)
    show(rows, page, cfg)


def run(todo: dict[str, Job], out: Path, workers: int) -> None:
    """Run all jobs, each as soon as those before it are done, `workers` at a time, with a progress bar each."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    env = os.environ | {"OMP_NUM_THREADS": "1", "DISTILL_CACHE": f"{out / 'cache'}", "PYTHONUNBUFFERED": "1"}
    text = TextColumn("{task.description:32}")
    columns = (text, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    (out / "logs").mkdir()

    def start(name: str, job: Job) -> None:
        with (out / "logs" / f"{name}.txt").open("w") as log:
            subprocess.run([sys.executable, *job.command], env=env, stdout=log, stderr=log, check=True)

    done: set[str] = set()
    running: dict[Future[None], str] = {}
    with Progress(*columns) as bars, ThreadPoolExecutor(workers) as pool:
        lines = {name: bars.add_task(job.title, total=None, start=False, visible=False) for name, job in todo.items()}
        while len(done) < len(todo):
            for name, job in todo.items():
                if len(running) < workers and name not in done | set(running.values()) and set(job.after) <= done:
                    running[pool.submit(start, name, job)] = name
                    bars.update(lines[name], visible=True)
                    bars.start_task(lines[name])
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                if future.exception():
                    log = out / "logs" / f"{name}.txt"
                    end = "\n".join(log.read_text().splitlines()[-12:])
                    fail(f"{todo[name].title} failed; the end of {log}:\n{end}")
                done.add(name)
                bars.update(lines[name], total=1, completed=1)
            for name in running.values():
                log = todo[name].log
                if log is not None and log.is_file() and (text := log.read_text().splitlines()):
                    steps = yaml.safe_load((log.parent / "config.yaml").read_text())["max_train_steps"]
                    bars.update(lines[name], total=steps, completed=json.loads(text[-1])["step"])


def show(rows: list[dict[str, Any]], page: Path, cfg: Demo) -> None:
    """The table in the terminal, where the page is, and what to run next."""
    from rich.console import Console

    from eval.report import table

    console = Console()
    report = json.loads((page.parent / "report.json").read_text())
    console.print(table(report["rows"], report["floor"]))
    console.print(
        f"[bold]{page}[/] has the pictures, curves and numbers. Open it in a browser: [bold]xdg-open {page}[/]"
    )
    student = page.parent / cfg.methods[0] / "pipeline"
    console.print(f"The one-step student {student} is a plain diffusers pipeline. Next:", highlight=False)
    console.print(f"  python -m eval.generate --model {student} --n 100 --out runs/images", highlight=False)
    for other in ("vsd", "lcd", "scm"):
        command = f"accelerate launch recipes/{other}_digits.py --teacher {page.parent / 'teacher'}"
        console.print(f"  {command} --output_dir runs/{other}", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Demo, use_underscores=True, description=__doc__))
