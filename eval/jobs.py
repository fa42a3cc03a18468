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

from distill.files import read_yaml

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


class Failed(RuntimeError):
    """A job ended with an error; the message holds the end of its log."""


def run(todo: dict[str, Job], out: Path, workers: int, patient: bool = False) -> dict[str, str]:
    """Run all jobs, `workers` at a time, with a progress bar each; what they print goes to `out`/logs/NAME.txt.

    A job that fails ends everything: Failed. patient: the others go on, those that need it are left out, and a
    process that a signal killed (memory, say) is started again, at most twice. Returns {name: why} of what failed.
    """
    from rich import progress

    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    env.setdefault("DISTILL_CACHE", f"{out / 'cache'}")
    title = progress.TextColumn("{task.description:34}")
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    (out / "logs").mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> None:
        log, code = out / "logs" / f"{name}.txt", 0
        for _ in range(3 if patient else 1):
            with log.open("w") as file:
                command = [sys.executable, *todo[name].command]
                processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
                code = processes[-1].wait()
            if code >= 0:
                break
        if code:
            how = "failed" if code > 0 else f"was killed by signal {-code}"
            raise Failed(f"'{todo[name].title}' {how}; {_end(log)}")

    done: set[str] = set()
    failed: dict[str, str] = {}
    running: dict[Future[None], str] = {}
    with progress.Progress(title, progress.BarColumn(), progress.TaskProgressColumn(), *times) as bars:
        lines = {name: bars.add_task(job.title, total=None, start=False, visible=False) for name, job in todo.items()}
        with ThreadPoolExecutor(workers) as pool:
            try:
                while len(done) + len(failed) < len(todo):
                    for name, job in todo.items():
                        busy = done | set(running.values()) | failed.keys()
                        if name not in busy and (lost := [n for n in job.after if n in failed]):
                            failed[name] = f"needs '{todo[lost[0]].title}', which failed"
                        elif len(running) < workers and name not in busy and set(job.after) <= done:
                            running[pool.submit(start, name)] = name
                            bars.update(lines[name], visible=True)
                            bars.start_task(lines[name])
                    finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in finished:
                        name = running.pop(future)
                        error = future.exception()
                        if isinstance(error, Failed) and patient:
                            failed[name] = str(error)
                            bars.update(lines[name], description=f"[red]{todo[name].title}: failed[/]")
                            bars.stop_task(lines[name])
                            continue
                        future.result()
                        done.add(name)
                        bars.update(lines[name], total=1, completed=1)
                    for name in running.values():
                        bars.update(lines[name], **_progress(todo[name].log))
            finally:
                for process in processes:
                    process.terminate()
    return failed


def _end(log: Path) -> str:
    """A command's own message, else the last lines that it wrote."""
    lines = log.read_text(errors="replace").splitlines()
    told = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[told[-1] :]) if told else "\n".join([f"the end of {log}:", *lines[-12:]])


def _progress(log: Path | None) -> dict[str, Any]:
    """Total and completed steps of a training run, from its config.yaml and the last line of its log."""
    if log is None or not log.is_file():
        return {}
    try:
        total = read_yaml(log.parent / "config.yaml")["max_train_steps"]
        return {"total": int(total), "completed": int(json.loads(log.read_text().splitlines()[-1])["step"])}
    except (OSError, ValueError, KeyError, IndexError, TypeError):  # a line is being written: the next look has it
        return {}
