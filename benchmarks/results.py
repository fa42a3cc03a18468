"""The digits over training seeds and noise seeds: docs/digits.md, docs/digits.json and docs/digits.html.

For every training seed a teacher, and a student of it by every recipe; for every model `noises` sets of n images. Runs
that are there are kept, so an interrupted command goes on where it was.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro
from tqdm import tqdm

from distill.config import fail
from eval.jobs import Job, recipe, run

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "teacher-35"  # model-calls; Heun's method with n steps makes 2 n - 1 calls
TEACHERS = {"teacher-9": 5, "teacher-17": 9, REFERENCE: 18}  # steps of Heun's method
STUDENTS = {"dmd2-1": 1, "sid-1": 1, "vsd-1": 1, "scm-1": 1, "lcd-1": 1, "lcd-2": 2}  # steps
GOALS = {"dmd2-1": 1.0, "sid-1": 1.15, "vsd-1": 1.15, "scm-1": 1.3, "lcd-2": 1.5}  # fd_heldout over the teacher's
KEYS = ("fd_heldout", "fd_train", "accuracy", "precision", "recall")


@dataclass(frozen=True)
class Results:
    """How much to measure."""

    output_dir: Path = Path("runs/results")  # runs and samples
    docs: Path = Path("docs")  # where the table and the page are written
    seeds: tuple[int, ...] = (0, 1, 2)  # of training
    noises: tuple[int, ...] = (100, 101, 102, 103, 104)  # of the samples
    n: int = 2000  # images of every evaluation
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)  # jobs side by side, one thread each


def jobs(cfg: Results) -> dict[str, Job]:
    """The training runs that are not finished."""
    todo = {}
    for seed in cfg.seeds:
        teacher = cfg.output_dir / f"teacher-{seed}"
        script, flags = ROOT / "recipes" / "digits_teacher.py", ("--seed", f"{seed}")
        if not (teacher / "model_index.json").is_file():
            todo[teacher.name] = recipe(script, f"teacher, seed {seed}", teacher, *flags)
        for m in sorted({name.split("-")[0] for name in STUDENTS}):
            folder, script = cfg.output_dir / f"{m}-{seed}", ROOT / "recipes" / f"{m}_digits.py"
            resume = ("--resume_from_checkpoint", "latest") if (folder / "config.yaml").is_file() else ()
            if not (folder / "pipeline" / "model_index.json").is_file():
                given = (*flags, "--teacher", f"{teacher}", *resume)
                after = (teacher.name,) if teacher.name in todo else ()
                todo[folder.name] = recipe(script, f"{m}, seed {seed}", folder, *given, after=after)
    return todo


def measure(cfg: Results) -> list[dict[str, Any]]:
    """The scores of every model x training seed x noise seed."""
    from eval.generate import generate
    from eval.score import score

    rows = []
    models = [(name, steps, seed) for seed in cfg.seeds for name, steps in (TEACHERS | STUDENTS).items()]
    for name, steps, seed in tqdm(models, desc="evaluate", unit="model"):
        family = name.split("-")[0]
        model = cfg.output_dir / f"{family}-{seed}" / ("" if family == "teacher" else "pipeline")
        log = cfg.output_dir / f"{family}-{seed}" / "log.jsonl"
        for noise in cfg.noises:
            out = cfg.output_dir / "samples" / f"{name}-{seed}-{noise}"
            generate(model, out, cfg.n, steps, seed=noise, name=name)
            seconds = json.loads(log.read_text().splitlines()[-1])["seconds"]
            rows.append(score(out) | {"train_seed": seed, "noise_seed": noise, "train_seconds": seconds})
    return rows


def nested(rows: list[dict[str, Any]], model: str, key: str) -> list[list[float]]:
    """The values of one model, a list a training seed."""
    mine = [row for row in rows if row["model"] == model]
    return [[r[key] for r in mine if r["train_seed"] == s] for s in sorted({r["train_seed"] for r in mine})]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model: means, intervals over training seeds, the ratio to the reference teacher, the goal."""
    from eval.intervals import mean_ci, ratio_ci

    table = []
    for model in TEACHERS | STUDENTS:
        first = next(row for row in rows if row["model"] == model)
        row = {k: first[k] for k in ("model", "nfe", "student", "n", "extractor", "floor_fd_heldout")}
        for key in (*KEYS, "images_per_second", "train_seconds"):
            row[key] = fmean(fmean(values) for values in nested(rows, model, key))
        for key in KEYS:
            interval = mean_ci(nested(rows, model, key))
            row[f"{key}_ci"] = [interval.low, interval.high]
        mine, reference = (nested(rows, m, "fd_heldout") for m in (model, REFERENCE))
        ratio = ratio_ci(mine, reference, paired=True) if model != REFERENCE else None
        row["ratio"], row["ratio_ci"] = (ratio.mean, [ratio.low, ratio.high]) if ratio else (1.0, None)
        row["goal"] = GOALS.get(model)
        table.append(row)
    return table


def verdict(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """Whether a student meets its goal, as the mean says, and whether the interval agrees."""
    if row["goal"] is None:
        return ""
    if reference["fd_train"] > 8 or reference["accuracy"] < 0.96:
        return "the teacher is too weak to count"
    if row["recall"] < 0.8 * reference["recall"]:
        return "collapsed"
    met = row["ratio"] <= row["goal"] and row["accuracy"] >= 0.96
    sure = row["ratio_ci"][1] <= row["goal"] if met else row["ratio_ci"][0] > row["goal"]
    return ("met" if met else "missed") + ("" if sure else ", interval undecided")


def markdown(table: list[dict[str, Any]], cfg: Results) -> str:
    reference = next(row for row in table if row["model"] == REFERENCE)
    head = ("model", "calls", "FD held-out", "/ teacher's", "goal", "verdict", "FD train")
    lines = [f"| {' | '.join((*head, 'accuracy', 'precision', 'recall'))} |", "|---" * 10 + "|"]
    for row in table:

        def cell(key: str, digits: int, row: dict[str, Any] = row) -> str:
            low, high = row[f"{key}_ci"] or (None, None)
            span = "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
            return f"{row[key]:.{digits}f}{span}"

        goal = "" if row["goal"] is None else f"<= {row['goal']:.2f}"
        cells = [row["model"].rsplit("-", 1)[0], str(row["nfe"]), cell("fd_heldout", 2), cell("ratio", 3), goal]
        cells += [verdict(row, reference), cell("fd_train", 2)]
        cells += [cell(key, 3) for key in ("accuracy", "precision", "recall")]
        lines.append(f"| {' | '.join(cells)} |")
    return f"""# One-step students of handwritten digits

`make results`: {len(cfg.seeds)} training seeds, each with its own teacher and students, x {len(cfg.noises)} noise seeds
x {cfg.n} images. Values are means; intervals are 95 % of Student's t over the training seeds. The ratio is paired: a
student against the teacher that it was distilled from. [digits.html](digits.html) is the page of the same run (its
pictures and curves are of the first seeds).

FD is the Frechet distance of 64 features of a classifier trained on the training split (`eval/features.py`, extractor
{table[0]["extractor"]}), to 597 held-out or 1,200 training scans; n is the same for every row. Real training against
real held-out scans: **{table[0]["floor_fd_heldout"]:.2f}**, the floor of the held-out column.

Settings were chosen by the distance to the *training* split; the held-out scans were used for this table only. No
checkpoint is chosen: every student is the average at its last step. A student counts only if the teacher has FD train
<= 8.0 and accuracy >= .96; it has collapsed if its recall is below 0.8 of the teacher's.

""" + "\n".join(lines)


def main(cfg: Results) -> None:
    began = time.perf_counter()
    if len(cfg.seeds) < 2:
        fail("intervals need at least two training seeds: --seeds 0 1 2")
    os.environ["DISTILL_CACHE"] = f"{cfg.output_dir / 'cache'}"
    try:
        run(jobs(cfg), cfg.output_dir, cfg.workers)
    except RuntimeError as error:
        fail(str(error))
    import torch

    torch.set_num_threads(1)  # two threads on a busy machine of two cores can be fifty times slower than one
    from eval.report import write

    rows = measure(cfg)
    table = summary(rows)
    cfg.docs.mkdir(exist_ok=True)
    (cfg.docs / "digits.md").write_text(markdown(table, cfg) + "\n")
    (cfg.docs / "digits.json").write_text(json.dumps({"rows": table, "runs": rows}, indent=1) + "\n")
    seed, noise = cfg.seeds[0], cfg.noises[0]
    shown = {name: cfg.output_dir / "samples" / f"{name}-{seed}-{noise}" for name in (REFERENCE, *STUDENTS)}
    logs = {m: cfg.output_dir / f"{m}-{seed}" / "log.jsonl" for m in ("teacher", "dmd2", "sid", "vsd", "scm", "lcd")}
    named = [row | {"model": row["model"].rsplit("-", 1)[0]} for row in table]
    page = write(cfg.output_dir, named, table[0]["floor_fd_heldout"], logs, shown, time.perf_counter() - began)
    (cfg.docs / "digits.html").write_text(page.read_text())
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown(table, cfg)))


if __name__ == "__main__":
    main(tyro.cli(Results, use_underscores=True, description=__doc__))
