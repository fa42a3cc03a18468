"""The leaderboard of all methods on digits, over seeds: docs/digits.md, docs/digits.json and docs/digits.html.

For every training seed a teacher, and a student of it by every recipe; for every model `noises` sets of n images. Runs
that are there are kept, so an interrupted command goes on where it was.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
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
METHODS = tuple(dict.fromkeys(name.split("-")[0] for name in STUDENTS))


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
        for m in sorted(METHODS):
            folder, script = cfg.output_dir / f"{m}-{seed}", ROOT / "recipes" / f"{m}_digits.py"
            resume = ("--resume_from_checkpoint", "latest") if (folder / "config.yaml").is_file() else ()
            if not (folder / "pipeline" / "model_index.json").is_file():
                given = (*flags, "--teacher", f"{teacher}", *resume)
                after = (teacher.name,) if teacher.name in todo else ()
                todo[folder.name] = recipe(script, f"{m}, seed {seed}", folder, *given, after=after)
    return todo


def measure(cfg: Results) -> list[dict[str, Any]]:
    """The rows of every model x training seed ("run") x noise seed; the costs of the first seeds."""
    from eval.generate import generate
    from eval.score import score

    rows = []
    models = [(name, steps, seed) for seed in cfg.seeds for name, steps in (TEACHERS | STUDENTS).items()]
    for name, steps, seed in tqdm(models, desc="evaluate", unit="model"):
        family = name.split("-")[0]
        model = cfg.output_dir / f"{family}-{seed}" / ("" if family == "teacher" else "pipeline")
        log = cfg.output_dir / f"{family}-{seed}" / "log.jsonl"
        seconds = json.loads(log.read_text().splitlines()[-1])["seconds"]
        for noise in cfg.noises:
            out = cfg.output_dir / "samples" / f"{name}-{seed}-{noise}"
            cost = cfg.output_dir / "costs" / f"{name}.json" if (seed, noise) == (cfg.seeds[0], cfg.noises[0]) else None
            asked: dict[str, Any] = {"seed": noise, "name": family, "protocol": "digits", "cost": cost}
            generate(f"{model}", out, cfg.n, steps, overwrite=True, **asked)
            row = score(out) | {"run": seed}
            known = (
                json.loads(cost.read_text()) if cost else {k: row["cost"][k] for k in ("nfe", "parameters", "hardware")}
            )
            row["cost"] = known | {"train_seconds": seconds}
            rows.append(row)
    return rows


def of(rows: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """The rows of a model of TEACHERS or STUDENTS."""
    family, steps = model.split("-")[0], (TEACHERS | STUDENTS)[model]
    return [row for row in rows if (row["model"], row["steps"]) == (family, steps)]


def nested(rows: list[dict[str, Any]], key: str) -> list[list[float]]:
    """The values of a figure, a list a training seed."""
    return [[r["metrics"][key]["value"] for r in rows if r["run"] == s] for s in sorted({r["run"] for r in rows})]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model: means with intervals over training seeds, the ratio to the reference teacher, the goal."""
    from eval.intervals import ratio_ci
    from eval.report import mean

    table: list[dict[str, Any]] = []
    for model in TEACHERS | STUDENTS:
        (row,) = mean(of(rows, model))
        mine, reference = (nested(of(rows, m), "fd_heldout") for m in (model, REFERENCE))
        ratio = ratio_ci(mine, reference, paired=True) if model != REFERENCE else None
        compared = [ratio.mean, ratio.low, ratio.high] if ratio else [1.0, 1.0, 1.0]
        figure = dict(zip(("value", "low", "high"), compared))
        goal = {"ratio": figure, "goal": GOALS.get(model)}
        table.append({**row, **goal})
    return table


def verdict(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """Whether a student meets its goal, as the mean says, and whether the interval agrees."""
    if row["goal"] is None:
        return ""
    mine, theirs = ({k: m["value"] for k, m in r["metrics"].items()} for r in (row, reference))
    if theirs["fd_train"] > 8 or theirs["accuracy"] < 0.96:
        return "the teacher is too weak to count"
    if mine["recall"] < 0.8 * theirs["recall"]:
        return "collapsed"
    ratio = row["ratio"]
    met = ratio["value"] <= row["goal"] and mine["accuracy"] >= 0.96
    sure = ratio["high"] <= row["goal"] if met else ratio["low"] > row["goal"]
    return ("met" if met else "missed") + ("" if sure else ", interval undecided")


def markdown(table: list[dict[str, Any]], floor: float, cfg: Results) -> str:
    """The document: how it was made, and a line a model."""
    reference = next(row for row in table if row["model"] == "teacher" and row["steps"] == TEACHERS[REFERENCE])
    head = ("model", "calls", "FD held-out", "/ teacher's", "goal", "verdict", "FD train")
    lines = [f"| {' | '.join((*head, 'accuracy', 'precision', 'recall'))} |", "|---" * 10 + "|"]
    for row in table:

        def cell(figure: dict[str, float], digits: int) -> str:
            span = (
                f" [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]" if figure["low"] < figure["high"] else ""
            )
            return f"{figure['value']:.{digits}f}{span}"

        goal = "" if row["goal"] is None else f"<= {row['goal']:.2f}"
        figures = row["metrics"]
        cells = [row["model"], f"{row['cost']['nfe']:g}", cell(figures["fd_heldout"], 2), cell(row["ratio"], 3), goal]
        cells += [verdict(row, reference), cell(figures["fd_train"], 2)]
        cells += [cell(figures[key], 3) for key in ("accuracy", "precision", "recall")]
        lines.append(f"| {' | '.join(cells)} |")
    return f"""# One-step students of handwritten digits

`make results`: {len(cfg.seeds)} training seeds, each with its own teacher and students, x {len(cfg.noises)} noise seeds
x {cfg.n} images. Values are means; intervals are 95 % of Student's t over the training seeds. The ratio is paired: a
student against the teacher that it was distilled from. [digits.html](digits.html) is the leaderboard of the same run:
ranks and ties, quality against cost, and pictures and curves of the first seeds.

Protocol {reference["protocol"]}, hash {reference["protocol_hash"]}. FD is the Frechet distance of 64 features of a
classifier trained on the training split (`eval/digits.py`, extractor {reference["extractor_hash"]}), to 597 held-out or
1,200 training scans; n is the same for every row. Real training against real held-out scans: **{floor:.2f}**, the floor
of the held-out column.

Settings were chosen by the distance to the *training* split; the held-out scans were used for this table only. No
checkpoint is chosen: every student is the average at its last step. A student counts only if the teacher has FD train
<= 8.0 and accuracy >= .96; it has collapsed if its recall is below 0.8 of the teacher's.

""" + "\n".join(lines)


def publish(rows: list[dict[str, Any]], floor: float, cfg: Results) -> Path:
    """Write the three documents from the rows of all runs; the page's path."""
    from eval import report
    from eval.leaderboard import write

    table = summary(rows)
    cfg.docs.mkdir(exist_ok=True)
    (cfg.docs / "digits.md").write_text(markdown(table, floor, cfg) + "\n")
    found = {"floor": floor, "rows": [row | {"samples": None} for row in table]}
    found["runs"] = [row | {"samples": None} for row in rows]
    (cfg.docs / "digits.json").write_text(json.dumps(found, indent=1) + "\n")
    logs = {m: cfg.output_dir / f"{m}-{cfg.seeds[0]}" / "log.jsonl" for m in ("teacher", *METHODS)}
    runs, noises = len(cfg.seeds), len(cfg.noises)
    lead = (
        f"Means and 95 % intervals over {runs} training seeds, {noises} sets of {cfg.n:,} images each. The dashed "
        "line is the distance of two sets of real digits. Pictures and curves are of the first seeds."
    )
    shown = [*table, report.real(table[0], "real digits", fd_heldout=floor)]
    page = write(cfg.output_dir, shown, "One-step students of handwritten digits", lead, logs)
    (cfg.docs / "digits.html").write_text(page.read_text())
    return page


def main(cfg: Results) -> None:
    if len(cfg.seeds) < 2:
        fail("intervals need at least two training seeds: --seeds 0 1 2")
    os.environ["DISTILL_CACHE"] = f"{cfg.output_dir / 'cache'}"
    try:
        run(jobs(cfg), cfg.output_dir, cfg.workers)
    except RuntimeError as error:
        fail(str(error))
    import torch

    torch.set_num_threads(1)  # two threads on a busy machine of two cores can be fifty times slower than one
    from distill.data import digits
    from eval import images
    from eval.leaderboard import show
    from eval.score import score

    rows = measure(cfg)
    images.write(cfg.output_dir / "samples" / "real", *digits("train"), overwrite=True, name="real digits")
    floor = score(cfg.output_dir / "samples" / "real", metrics=("fd_heldout",))["metrics"]["fd_heldout"]["value"]
    show(publish(rows, floor, cfg))


if __name__ == "__main__":
    main(tyro.cli(Results, use_underscores=True, description=__doc__))
