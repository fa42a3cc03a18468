"""The main job, end to end: a teacher on handwritten digits, one-step students, evaluation, a leaderboard.

Trains everything from scratch, side by side, one thread each; reads no stored weights and needs no network.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from distill.configuration import fail
from distill.files import folder_lock
from distill.layout import module_name, program_name
from distill.progress import stage
from distill.ranges import Count, Seed, validate_ranges
from distill.training.checkpoint import describe_disk_error
from eval.leaderboard.jobs import Job, recipe_job, run_jobs
from recipes.digits import TABLE, TEACHER

RECIPES = Path(__file__).resolve().parent
LEAD = (
    "The dashed line is the distance of two sets of real digits: a distance near it is as good as this measure can "
    "tell. Everything was made in {:.1f} minutes, training included."
)
CALLS = {"teacher-9": "5", "teacher-17": "9", "teacher-35": "18"}  # network calls: steps of Heun's method


@dataclass(frozen=True)
class Demo:
    """What to run."""

    output_dir: str = "runs/demo"
    methods: tuple[str, ...] = ("dmd2", "sid")  # rows of recipes/digits.py
    n: Count = 2000  # images of every evaluation
    seed: Seed = 0  # of everything that is trained
    workers: Count = field(default_factory=lambda: os.cpu_count() or 1)  # jobs side by side, one thread each

    def __post_init__(self) -> None:
        validate_ranges(self, "--")


def jobs(cfg: Demo, out: Path) -> dict[str, Job]:
    """Everything up to the samples of every model."""

    def sample(name: str, model: Path, *flags: str, after: str) -> Job:
        where = ["--model", f"{model}", "--out", f"{out / 'samples' / name}", "--name", after, "--n", f"{cfg.n}"]
        command = ["-m", module_name("eval.generate"), "--protocol", "digits", *where, *flags]
        return Job(f"sample {name}", command, (after,))

    seed = ("--seed", f"{cfg.seed}")
    given = (*seed, "--teacher", f"{out / 'teacher'}")
    classifier = ["-c", f"from {module_name('eval.features.digits')} import classifier; classifier()"]
    todo = {
        "teacher": recipe_job(RECIPES / "digits_teacher.py", "train the teacher", out / "teacher", *seed),
        "features": Job("train the feature classifier", classifier),
    }
    for m in cfg.methods:
        title = f"distil {m} to one step"
        todo[m] = recipe_job(RECIPES / "train.py", title, out / m, "--method", m, *given, after=("teacher",))
    for name, steps in CALLS.items():
        todo[name] = sample(name, out / "teacher", "--steps", steps, after="teacher")
    for m in cfg.methods:
        todo[f"{m}-1"] = sample(f"{m}-1", out / m / "pipeline", after=m)
    return todo


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run; every mistake of the user ends in one message."""
    try:
        cfg = tyro.cli(Demo, args=argv, use_underscores=True, description=__doc__, prog=program_name())
        known = sorted(name for name, row in TABLE.items() if row.config.teacher == TEACHER)
        if missing := [m for m in cfg.methods if m not in known]:
            raise ValueError(f"recipes/digits.py has no values for {missing}; it has them for {known}")
        with folder_lock(cfg.output_dir, beside=True):
            demonstrate(cfg, Path(cfg.output_dir))
    except (ValueError, RuntimeError, OSError) as error:
        fail(describe_disk_error(error) or str(error))


def demonstrate(cfg: Demo, out: Path) -> None:
    """Train, sample, measure, and write the page."""
    began = time.perf_counter()
    if out.exists() and not (out / "demo.json").is_file():
        raise ValueError(f"{out} exists and is not an earlier demo: choose another --output_dir")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "demo.json").write_text(json.dumps({"methods": cfg.methods, "n": cfg.n, "seed": cfg.seed}))
    run_jobs(jobs(cfg, out), out, cfg.workers)

    os.environ["DISTILL_CACHE"] = f"{out / 'cache'}"
    from eval.leaderboard.commands import print_tables, write_page

    logs = {name: out / name / "log.jsonl" for name in ("teacher", *cfg.methods)}
    rows = measure_models(cfg, out)
    lead = LEAD.format((time.perf_counter() - began) / 60)
    with stage("write the page"):
        page = write_page(out, rows, "One-step distillation of handwritten digits", lead, logs)
    print_tables(page)
    student = out / cfg.methods[0] / "pipeline"
    teacher = out / "teacher"
    lines = [
        "It has the pictures, the curves and every number.",
        f"{student} is a plain diffusers pipeline. What to run next:",
        f"  python -m eval.generate --model {student} --n 100 --out runs/images",
        *(f"  accelerate launch -m recipes.train --method {m} --teacher {teacher}" for m in ("vsd", "lcd", "scm")),
    ]
    sys.stderr.write("\n".join(lines) + "\n")


def measure_models(cfg: Demo, out: Path) -> list[dict[str, Any]]:
    """The rows of all sample folders with their costs, and that of the real digits."""
    import torch

    from distill.data import digits
    from eval.figures import score_folder
    from eval.images import images
    from eval.leaderboard import tables
    from eval.sampling.image_set import generate
    from eval.score import score_folders

    torch.set_num_threads(1)
    names = {**dict.fromkeys(CALLS, "teacher"), **{f"{m}-1": m for m in cfg.methods}}
    with stage(f"measure the quality of {len(names)} sets of images"):
        rows = score_folders(tuple(out / "samples" / name for name in names))
    for (name, model), row in zip(names.items(), rows):  # now that nothing runs beside
        folder = out / model
        cost = out / "samples" / f"{name}.json"
        source, steps = (folder, int(CALLS[name])) if name in CALLS else (folder / "pipeline", None)
        with stage(f"measure the time of an image of {name}"):
            generate(f"{source}", out / "samples" / name, cfg.n, steps, name=model, protocol="digits", cost=cost)
        row["cost"] |= json.loads(cost.read_text())
        row["cost"]["train_seconds"] = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["seconds"]
    with stage("measure the real digits"):
        images.write_folder(out / "samples" / "real", *digits("train"), overwrite=True, name="real digits")
        floor = score_folder(out / "samples" / "real", metrics=("fd_heldout",))["metrics"]["fd_heldout"]["value"]
    return [*rows, tables.real_images_row(rows[0], "real digits", fd_heldout=floor)]


if __name__ == "__main__":
    main()
