"""Run commands in parallel, each in its own process, after the commands that it depends on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.configuration import escape_for_terminal
from distill.files import folder_lock, read_yaml
from distill.progress import LEAST, MOST, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress

LAUNCH = "accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"


@dataclass
class Job:
    """`python *command` in a process of its own with one thread, after other jobs."""

    title: str
    command: list[str]
    after: tuple[str, ...] = ()
    log: Path | None = None  # log.jsonl of a training run: the source of its progress


def recipe_job(script: Path, title: str, folder: Path, *flags: str, after: tuple[str, ...] = ()) -> Job:
    """A recipe under `accelerate launch` on one process; its progress is read from the folder's log.jsonl."""
    launch = ["-m", *LAUNCH.split(), "--num_cpu_threads_per_process", "1"]
    return Job(title, [*launch, f"{script}", "--output_dir", f"{folder}", *flags], after, folder / "log.jsonl")


class JobFailure(RuntimeError):
    """A job ended with an error; the message holds the end of its log."""


def run_jobs(todo: dict[str, Job], out: Path, workers: int, patient: bool = False) -> dict[str, str]:
    """Run all jobs, `workers` at a time, with progress; their output goes to `out`/logs/NAME.txt.

    A failed job stops all jobs and raises JobFailure. patient: the other jobs continue, jobs that depend on it are left
    out, and a process that was killed by a signal (lack of memory, say) is started again, at most twice. Returns
    {name: reason} of the failed jobs. ValueError for fewer than one worker, for circular dependencies, and if another
    command uses `out`.
    """
    if type(workers) is not int or workers < 1:
        raise ValueError(f"workers is {workers!r}; it must be a whole number, at least 1")
    if waiting := _unstartable_jobs(todo):
        raise ValueError(f"'{todo[waiting[0]].title}' depends on jobs that cannot finish or do not exist")
    with folder_lock(out, "folder"), _progress_display(todo, out) as display:
        return Queue(todo, out, workers, patient, display).run()


class Queue:
    """The state of all jobs: running, done and failed."""

    def __init__(
        self, todo: dict[str, Job], out: Path, workers: int, patient: bool, display: BarDisplay | LineDisplay
    ) -> None:
        self.todo = todo
        self.logs = out / "logs"
        self.workers = workers
        self.patient = patient
        self.display = display
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.env.setdefault("DISTILL_CACHE", f"{out / 'cache'}")
        self.logs.mkdir(parents=True, exist_ok=True)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.running: dict[Future[None], str] = {}
        self.over = False  # True: running processes are stopped and no new one starts

    def run(self) -> dict[str, str]:
        """Run all jobs; {name: reason} of the failed ones."""
        with ThreadPoolExecutor(self.workers) as pool, exit_on_sigterm():
            try:
                while len(self.done) + len(self.failed) < len(self.todo):
                    self._start_ready_jobs(pool)
                    finished, _ = wait(self.running, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in finished:
                        self._record_end(self.running.pop(future), future.exception())
                    for name in self.running.values():
                        self.display.update_job(name)
            finally:
                self.over = True
                for process in self.processes:
                    process.terminate()
        return self.failed

    def _start_ready_jobs(self, pool: ThreadPoolExecutor) -> None:
        """Start the jobs whose dependencies are done; mark those as failed whose dependencies failed."""
        for name, job in self.todo.items():
            if name in self.done | set(self.running.values()) | self.failed.keys():
                continue
            if lost := [need for need in job.after if need in self.failed]:
                self.failed[name] = f"needs '{self.todo[lost[0]].title}', which failed"
            elif len(self.running) < self.workers and set(job.after) <= self.done:
                self.running[pool.submit(self._run_job, name)] = name
                self.display.start_job(name)

    def _run_job(self, name: str) -> None:
        """Run one job; called in a thread."""
        log = self.logs / f"{name}.txt"
        code = 0
        for _ in range(3 if self.patient else 1):
            with log.open("w") as file:
                command = [sys.executable, *self.todo[name].command]
                self.processes.append(subprocess.Popen(command, env=self.env, stdout=file, stderr=file))
                code = self.processes[-1].wait()
            if code >= 0 or self.over:
                break
        if code:
            how = "failed" if code > 0 else f"was killed by signal {-code}"
            raise JobFailure(f"'{self.todo[name].title}' {how}; {_log_tail(log)}")

    def _record_end(self, name: str, error: BaseException | None) -> None:
        if error is None:
            self.done.add(name)
        elif self.patient and isinstance(error, JobFailure):
            self.failed[name] = str(error)
        self.display.finish_job(name, error is None)
        if error is not None and name not in self.failed:
            raise error


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, so that its jobs end with it."""

    def handle(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, handle) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


class BarDisplay:
    """A bar for each job, on a terminal."""

    def __init__(self, todo: dict[str, Job], bars: Progress) -> None:
        self.todo = todo
        self.bars = bars
        self.tasks = {name: bars.add_task(job.title, False, None, visible=False) for name, job in todo.items()}

    def start_job(self, name: str) -> None:
        self.bars.update(self.tasks[name], visible=True)
        self.bars.start_task(self.tasks[name])

    def update_job(self, name: str) -> None:
        self.bars.update(self.tasks[name], **_progress(self.todo[name].log))

    def finish_job(self, name: str, well: bool) -> None:
        if well:
            self.bars.update(self.tasks[name], total=1, completed=1)
        else:
            self.bars.update(self.tasks[name], description=f"[red]{self.todo[name].title}: failed[/]")
            self.bars.stop_task(self.tasks[name])


class LineDisplay:
    """Without a terminal: a line when a job starts and ends and, more and more rarely, the last line of its output."""

    def __init__(self, todo: dict[str, Job], logs: Path) -> None:
        self.todo = todo
        self.logs = logs
        self.start_times: dict[str, float] = {}
        self.last_update: dict[str, float] = {}

    def start_job(self, name: str) -> None:
        self.start_times[name] = self.last_update[name] = time.monotonic()
        sys.stderr.write(f"{self.todo[name].title} ...\n")

    def update_job(self, name: str) -> None:
        now = time.monotonic()
        if now - self.last_update[name] < min(max(3 * LEAST, (now - self.start_times[name]) / 10), MOST):
            return
        self.last_update[name] = now
        lines = (self.logs / f"{name}.txt").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output yet")
        spent = format_seconds(now - self.start_times[name])
        sys.stderr.write(f"{self.todo[name].title}, {spent}: {escape_for_terminal(last[-160:])}\n")

    def finish_job(self, name: str, well: bool) -> None:
        took = format_seconds(time.monotonic() - self.start_times[name])
        sys.stderr.write(f"{self.todo[name].title}: {'done' if well else 'failed'} after {took}\n")


@contextmanager
def _progress_display(todo: dict[str, Job], out: Path) -> Iterator[BarDisplay | LineDisplay]:
    from rich import progress

    title = progress.TextColumn("{task.description:34}")
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    bars = progress.Progress(title, progress.BarColumn(), progress.TaskProgressColumn(), *times)
    if not bars.console.is_terminal:
        yield LineDisplay(todo, out / "logs")
        return
    with bars:
        yield BarDisplay(todo, bars)


def _unstartable_jobs(todo: dict[str, Job]) -> list[str]:
    """The jobs that could never start."""
    able: set[str] = set()
    while new := [name for name, job in todo.items() if name not in able and {*job.after} <= able]:
        able.update(new)
    return [name for name in todo if name not in able]


def _log_tail(log: Path) -> str:
    """The error message of a command, else the last lines of its output."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[errors[-1] :]) if errors else "\n".join([f"the end of {log}:", *lines[-12:]])


def _progress(log: Path | None) -> dict[str, Any]:
    """Total and completed steps of a training run, from its config.yaml and the last whole line of its log."""
    lines = log.read_text().split("\n")[:-1] if log is not None and log.is_file() else []
    if log is None or not lines:
        return {}
    try:
        total = read_yaml(log.parent / "config.yaml")["max_train_steps"]
        return {"total": total, "completed": json.loads(lines[-1])["step"]}
    except (ValueError, KeyError, TypeError):  # a truncated file: show no progress; the job reports it
        return {}
