"""Commands in processes of their own, side by side, each as soon as those that it needs are done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LAUNCH = "accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"


@dataclass
class Job:
    """`python *command` in a process of its own with one thread, after other jobs."""

    title: str
    command: list[str]
    after: tuple[str, ...] = ()
    log: Path | None = None  # log.jsonl of a training run: the source of its progress


def recipe(script: Path, title: str, folder: Path, *flags: str, after: tuple[str, ...] = ()) -> Job:
    """A recipe under `accelerate launch` on one process; its progress is read from the folder's log.jsonl."""
    launch = ["-m", *LAUNCH.split(), "--num_cpu_threads_per_process", "1"]
    return Job(title, [*launch, f"{script}", "--output_dir", f"{folder}", *flags], after, folder / "log.jsonl")


def run(todo: dict[str, Job], out: Path, workers: int) -> None:
    """Run all jobs, `workers` at a time, with a progress bar each; what they print goes to `out`/logs/NAME.txt.

    A job that fails ends everything: RuntimeError with the end of its log.
    """
    from rich import progress

    env = os.environ | {"OMP_NUM_THREADS": "1", "DISTILL_CACHE": f"{out / 'cache'}", "PYTHONUNBUFFERED": "1"}
    title = progress.TextColumn("{task.description:34}")
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    (out / "logs").mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> None:
        log = out / "logs" / f"{name}.txt"
        with log.open("w") as file:
            processes.append(subprocess.Popen([sys.executable, *todo[name].command], env=env, stdout=file, stderr=file))
            if processes[-1].wait():
                end = "\n".join(log.read_text().splitlines()[-12:])
                raise RuntimeError(f"'{todo[name].title}' failed; the end of {log}:\n{end}")

    done: set[str] = set()
    running: dict[Future[None], str] = {}
    with progress.Progress(title, progress.BarColumn(), progress.TaskProgressColumn(), *times) as bars:
        lines = {name: bars.add_task(job.title, total=None, start=False, visible=False) for name, job in todo.items()}
        with ThreadPoolExecutor(workers) as pool:
            try:
                while len(done) < len(todo):
                    for name, job in todo.items():
                        busy = done | set(running.values())
                        if len(running) < workers and name not in busy and set(job.after) <= done:
                            running[pool.submit(start, name)] = name
                            bars.update(lines[name], visible=True)
                            bars.start_task(lines[name])
                    finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in finished:
                        name = running.pop(future)
                        future.result()
                        done.add(name)
                        bars.update(lines[name], total=1, completed=1)
                    for name in running.values():
                        bars.update(lines[name], **_progress(todo[name].log))
            finally:
                for process in processes:
                    process.terminate()


def _progress(log: Path | None) -> dict[str, Any]:
    """Total and completed steps of a training run, from its config.yaml and the last line of its log."""
    lines = log.read_text().splitlines() if log is not None and log.is_file() else []
    if log is None or not lines:
        return {}
    total = yaml.safe_load((log.parent / "config.yaml").read_text())["max_train_steps"]
    return {"total": total, "completed": json.loads(lines[-1])["step"]}
