"""The leaderboard of all methods on digits, over seeds: docs/digits.md and docs/digits.json.

Each training seed has a teacher, and a student of it by every row of recipes/digits.py, each for the same number of
forward passes. Each model makes `noises` sets of n images. The command keeps runs that exist, so it can be interrupted
and started again. The table holds all finished runs. Rows of docs/digits.json of other methods stay: a checkout has
that file and no runs.

make results ARGS="--methods sida dmd --seeds 0"     train these with this seed, and write the table of all
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro
from tqdm import tqdm

from distill.configuration import Config, fail, parse
from eval.leaderboard.jobs import Job, recipe_job, run_jobs
from recipes.digits import SMALL, TABLE, TEACHER

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "teacher-35"  # model-calls; Heun's method with n steps makes 2 n - 1 calls
TEACHERS = {"teacher-9": 5, "teacher-17": 9, REFERENCE: 18}  # steps of Heun's method
FEWER = {"lcd": (1,), "rglcd": (1,), "tcd": (1,)}  # calls of students that can do with fewer than their recipe's
GOALS = {"dmd2-1": 1.0, "sid-1": 1.15, "vsd-1": 1.15, "scm-1": 1.3, "lcd-2": 1.5}  # fd_heldout over the teacher's


@dataclass(frozen=True)
class Stage:
    """A run of a row. Its flags may name the folders of the stages before, {run[0]}, or their last checkpoints."""

    recipe: str
    flags: tuple[str, ...] = ()
    own: bool = False  # takes its own number of steps; the other stages share what this leaves of the budget


STAGES = {  # of the methods that are more than a run of their recipe
    "disback": (Stage("degradation", own=True), Stage("disback", ("--method.record", "{run[0]}"))),
    "msd": (Stage("msd"), Stage("msd", ("--data.classes", *"56789"))),
    "phased": (Stage("phased"), Stage("phased", ("--student.experts", "{last[0]}"))),
    "tcm": (  # ECT's stages in half its steps
        Stage("ect", ("--method.curriculum.every", "375")),
        Stage("tcm", ("--student.init", "{last[0]}")),
    ),
    "tsm": (
        Stage("tsm"),
        Stage("sid", ("--student.network", SMALL, "--student.init", "{last[0]}")),
    ),
}
PARTS = {"msd"}  # whose student is the students of all stages, in one pipeline
METHODS = tuple(  # what tunes a finished student is another thing, and so is DisBack's first stage
    sorted(name for name, row in TABLE.items() if row.config.teacher == TEACHER and name != "degradation")
)


@dataclass(frozen=True)
class Results:
    """How much to measure."""

    output_dir: Path = Path("runs/results")  # runs and samples
    docs: Path = Path("docs")  # where the table is written
    seeds: tuple[int, ...] = (0, 1, 2)  # of training
    noises: tuple[int, ...] = (100, 101, 102, 103, 104)  # of the samples
    n: int = 2000  # images of every evaluation
    methods: tuple[str, ...] = METHODS  # that are trained if they are not yet; all that are finished are measured
    passes: int = 1_536_000  # forward passes of one image that each student's training may cost
    timing: bool = True  # measure latency and memory: on a machine that does nothing else
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)  # jobs side by side, one thread each


@cache
def models() -> dict[str, int]:
    """The calls of every teacher and student, or the teacher's steps: {"dmd2-1": 1, ...}."""
    own = {m: TABLE[m].config.student for m in METHODS}
    calls = {m: {*FEWER.get(m, ()), len(s.times) if s.times else s.steps} for m, s in own.items()}
    return TEACHERS | {f"{m}-{k}": k for m in METHODS for k in sorted(calls[m])}


def passes(config: Config, steps: int) -> float:
    """Forward passes of one image that so many steps cost: a backward pass is 2, making pairs counts, too."""
    from distill.data.labels import LabelPairs
    from distill.training.build import build
    from pipelines.families import edm
    from pipelines.planning import flop_counter
    from recipes.digits_teacher import Teacher

    made = Teacher()
    student = config.student
    method = config.method
    teacher = edm.teacher(edm.unet(made.channels, layers=made.layers), made.sigma_d, null_class=10)
    teacher.denoiser.net.to("meta")
    c = {key: value.to("meta") for key, value in teacher.encode([0]).items()}
    if getattr(method, "record", None):  # a recorded teacher costs what the teacher does
        method = replace(method, record=None)
    nets = build(method, teacher.denoiser, teacher.shape, c, replace(student, init=None, experts=()), config.fake)
    nets.student = replace(nets.student, experts=(nets.teacher,) * len(student.experts))  # as do experts
    step = config.train.train_batch_size * flop_counter.passes(method, nets, c)
    pairs = 0
    data = config.data
    if isinstance(data, LabelPairs):
        pairs = data.n * (2 * data.steps - 1) * (1 if data.guidance == 1 else 2)  # Heun's method
    return pairs + steps * step


def affordable(config: Config, budget: float) -> int:
    """The steps that so many forward passes of one image pay for."""
    start = passes(config, 0)
    one = passes(config, 1)
    return round((budget - start) / (one - start))


def stages(method: str, budget: int) -> list[tuple[Stage, int]]:
    """The stages of a method, each with the steps that its share of the budget pays for."""
    found = STAGES.get(method, (Stage(method),))
    configs = [parse(TABLE[stage.recipe].config, list(stage.flags)) for stage in found]
    own = [c for c, stage in zip(configs, found, strict=True) if stage.own]
    share = (budget - sum(passes(c, c.train.max_train_steps) for c in own)) / (len(found) - len(own))
    return [
        (stage, c.train.max_train_steps if stage.own else affordable(c, share))
        for stage, c in zip(found, configs, strict=True)
    ]


def runs(cfg: Results, method: str, seed: int) -> list[Path]:
    """The folders of a method's runs; the student is in the last's, or, if it has parts, in one of its own."""
    n = len(STAGES.get(method, (method,)))
    names = [f"{method}-{seed}.{i + 1}" for i in range(n)]
    return [cfg.output_dir / name for name in (names if method in PARTS else [*names[:-1], f"{method}-{seed}"])]


def jobs(cfg: Results) -> dict[str, Job]:
    """The training runs that are not finished."""
    todo = {}
    done = lambda folder: (folder / "pipeline" / "model_index.json").is_file()
    for seed in cfg.seeds:
        teacher = cfg.output_dir / f"teacher-{seed}"
        script = ROOT / "recipes" / "digits_teacher.py"
        flags = ("--seed", f"{seed}")
        if not (teacher / "model_index.json").is_file():
            todo[teacher.name] = recipe_job(script, f"teacher, seed {seed}", teacher, *flags)
        for m in cfg.methods:
            student = cfg.output_dir / f"{m}-{seed}"
            folders = runs(cfg, m, seed)
            if done(student):
                continue
            planned = stages(m, cfg.passes)
            last = [folder / f"checkpoint-{steps}" for folder, (_, steps) in zip(folders, planned, strict=True)]
            for folder, (stage, steps) in zip(folders, planned, strict=True):
                if done(folder):
                    continue
                script = ROOT / "recipes" / "train.py"
                given = ["--method", stage.recipe, *flags, "--max_train_steps", f"{steps}", "--teacher", f"{teacher}"]
                given += [flag.format(run=folders, last=last) for flag in stage.flags]
                if (folder / "config.yaml").is_file():
                    given += ["--resume_from_checkpoint", "latest"]
                after = tuple(f.name for f in (teacher, *folders) if f.name in todo and f"{f}" in " ".join(given))
                todo[folder.name] = recipe_job(script, f"{m}, seed {seed}", folder, *given, after=after)
            if m in PARTS:
                command = ["-m", "pipelines.experts", *(f"{folder / 'pipeline'}" for folder in folders)]
                after = tuple(folder.name for folder in folders if folder.name in todo)
                command += ["--output_dir", f"{student / 'pipeline'}"]
                todo[student.name] = Job(f"{m}, seed {seed}, all parts", command, after)
    return todo


def trained(cfg: Results) -> list[int]:
    """The seeds that have a teacher."""
    return sorted(int(file.parent.name.split("-")[1]) for file in cfg.output_dir.glob("teacher-*/model_index.json"))


def measure(cfg: Results) -> list[dict[str, Any]]:
    """The rows of every finished model x training seed ("run") x noise seed; the costs of the first seeds."""
    rows = []
    asked = [(name, steps, seed) for seed in trained(cfg) for name, steps in models().items()]
    for name, steps, seed in tqdm(asked, desc="evaluate", unit="model"):
        family = name.split("-")[0]
        folder = cfg.output_dir / f"{family}-{seed}"
        model = folder / ("" if family == "teacher" else "pipeline")
        if not (model / "model_index.json").is_file():
            continue
        file = cfg.output_dir / "rows" / f"{name}-{seed}.json"
        known = json.loads(file.read_text()) if file.is_file() else []
        if [(row["seeds"], row["n"]) for row in known] != [([noise], cfg.n) for noise in cfg.noises]:
            spent = None
            if family != "teacher":
                spent = spending(cfg, family, seed)
            known = [evaluate(cfg, name, steps, seed, noise, model, spent) for noise in cfg.noises]
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(known))
        rows += known
    return rows


def spending(cfg: Results, method: str, seed: int) -> float:
    """Forward passes of one image that a method's training has cost."""
    total = 0.0
    for stage, folder in zip(STAGES.get(method, (Stage(method),)), runs(cfg, method, seed), strict=True):
        config = parse(TABLE[stage.recipe].config, ["--config", f"{folder / 'config.yaml'}"])
        total += passes(config, config.train.max_train_steps)
    return total


def evaluate(
    cfg: Results, name: str, steps: int, seed: int, noise: int, model: Path, spent: float | None
) -> dict[str, Any]:
    """The row of one model and noise seed; spent: forward passes of its training."""
    from eval.figures import score_folder
    from eval.sampling.image_set import generate

    family = name.split("-")[0]
    logs = [run / "log.jsonl" for run in runs(cfg, family, seed)]
    out = cfg.output_dir / "samples" / f"{name}-{seed}-{noise}"
    first = cfg.timing and (seed, noise) == (trained(cfg)[0], cfg.noises[0])
    cost = cfg.output_dir / "costs" / f"{name}.json" if first else None
    asked: dict[str, Any] = {"seed": noise, "name": family, "protocol": "digits", "cost": cost}
    generate(f"{model}", out, cfg.n, steps, overwrite=True, **asked)
    row = score_folder(out) | {"run": seed}
    known = json.loads(cost.read_text()) if cost else {k: row["cost"][k] for k in ("nfe", "parameters", "hardware")}
    seconds = sum(json.loads(log.read_text().splitlines()[-1])["seconds"] for log in logs)
    row["cost"] = known | {"train_seconds": seconds, "train_passes": spent}
    return row


def of(rows: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """The rows of one of the `models`."""
    family = model.split("-")[0]
    steps = models()[model]
    return [row for row in rows if (row["model"], row["steps"]) == (family, steps)]


def nested(rows: list[dict[str, Any]], key: str) -> list[list[float]]:
    """The values of a figure, a list a training seed."""
    return [[r["metrics"][key]["value"] for r in rows if r["run"] == s] for s in sorted({r["run"] for r in rows})]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model: means with intervals over training seeds, the ratio to the reference teacher, the goal.

    A model of a single training seed has no intervals.
    """
    from eval.leaderboard.tables import average_seeds
    from eval.metrics.intervals import ratio_ci

    table: list[dict[str, Any]] = []
    for model in models():
        if not (found := of(rows, model)):
            continue
        (row,) = average_seeds(found)
        runs = {r["run"] for r in found}
        mine, reference = (
            nested([r for r in of(rows, m) if r["run"] in runs], "fd_heldout") for m in (model, REFERENCE)
        )
        figure = {"value": fmean(mine[0]) / fmean(reference[0])}
        if len(runs) > 1 and model != REFERENCE:
            ratio = ratio_ci(mine, reference, paired=True)
            figure = {"value": ratio.mean, "low": ratio.low, "high": ratio.high}
        goal = {"ratio": figure, "goal": GOALS.get(model)}
        table.append({**row, **goal, "runs": sorted(runs)})
    return table


def collapsed(row: dict[str, Any], reference: dict[str, Any]) -> bool:
    """Whether a student's recall is below 0.8 of the reference teacher's."""
    mine, theirs = (r["metrics"]["recall"]["value"] for r in (row, reference))
    return mine < 0.8 * theirs


def verdict(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """Whether a student collapsed or meets its goal, as the mean says, and whether the interval agrees."""
    if row["kind"] == "teacher":
        return ""
    mine, theirs = ({k: m["value"] for k, m in r["metrics"].items()} for r in (row, reference))
    if theirs["fd_train"] > 8 or theirs["accuracy"] < 0.96:
        return "the teacher is too weak to count"
    if collapsed(row, reference):
        return "collapsed"
    if row["goal"] is None:
        return ""
    ratio = row["ratio"]
    met = ratio["value"] <= row["goal"] and mine["accuracy"] >= 0.96
    sure = "low" in ratio and (ratio["high"] <= row["goal"] if met else ratio["low"] > row["goal"])
    return ("met" if met else "missed") + ("" if sure else ", interval undecided")


def ranked(table: list[dict[str, Any]]) -> dict[int, str]:
    """{place in the table: rank by the held-out distance}, 2= for a tie; of students of several training seeds."""
    from eval.leaderboard.tables import group_boards

    place = {id(row): i for i, row in enumerate(table)}
    rows = [row for row in table if row["kind"] != "teacher" and len(row["runs"]) > 1]
    if not rows:
        return {}
    (board,) = group_boards(rows)
    ranks = board.rank_rows("fd_heldout")
    return {place[id(board.rows[i])]: f"{rank}{'=' if tie else ''}" for i, (rank, tie) in ranks.items()}


def markdown(table: list[dict[str, Any]], floor: float, cfg: Results) -> str:
    """The document: how it was made, a line a model, and a few words on each method."""
    reference = next(row for row in table if row["model"] == "teacher" and row["steps"] == TEACHERS[REFERENCE])
    head = ("model", "calls", "seeds", "rank", "FD held-out", "/ teacher's", "goal", "verdict", "FD train")
    head += ("accuracy", "precision", "recall", "passes")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    ranks = ranked(table)

    def cell(figure: dict[str, float], digits: int) -> str:
        low, high = (figure.get(key) for key in ("low", "high"))
        span = "" if low is None or low == high else f" [{low:.{digits}f}, {high:.{digits}f}]"
        return f"{figure['value']:.{digits}f}{span}"

    for i, row in enumerate(table):
        figures = row["metrics"]
        spent = row["cost"].get("train_passes")
        cells = [row["model"], f"{row['cost']['nfe']:g}", " ".join(map(str, row["runs"])), ranks.get(i, "")]
        cells += [cell(figures["fd_heldout"], 2), cell(row["ratio"], 3)]
        cells += ["" if row["goal"] is None else f"<= {row['goal']:.2f}", verdict(row, reference)]
        cells += [cell(figures["fd_train"], 2), *(cell(figures[key], 3) for key in ("accuracy", "precision", "recall"))]
        lines.append(f"| {' | '.join([*cells, f'{spent / 1e6:.2f} M' if spent else ''])} |")
    names = dict.fromkeys(row["model"] for row in table if row["kind"] != "teacher")
    missing = [m for m in METHODS if m not in names]
    words = [f"- **{m}**: {TABLE[m].advice}" for m in METHODS]
    several = [f"{m} ({', then '.join(stage.recipe for stage in STAGES[m])})" for m in STAGES if m in names]
    return f"""# Students of handwritten digits, one row for each method

`make results` trains a teacher for each training seed, and a student of that teacher by each method. Each model then
makes {len(cfg.noises)} sets of {cfg.n:,} images. A value is the mean. An interval is the 95 % confidence interval of
Student's t over the training seeds. A model of one seed has no interval and no rank. The rank is one more than the
number of rows whose whole interval is better; = marks a tie. The ratio compares a student with its own teacher, seed by
seed. The command also writes a page with plots of quality against cost, samples and training curves:
`{cfg.output_dir}/index.html`.

FD is the Frechet distance between the images and real scans, in 64 features of a classifier that was trained on the
training split (`eval/features/digits.py`, extractor {reference["extractor_hash"]}). There are 597 held-out scans and
1,200 training scans; every row has the same number of images. Real training scans are at a distance of **{floor:.2f}**
from real held-out scans. The protocol is {reference["protocol"]}, hash {reference["protocol_hash"]}.

The settings were chosen by the distance to the *training* split. The held-out scans served for this table only. No
checkpoint is selected: every student is the average of its weights at its last step. A student counts only if its
teacher has FD train <= 8.0 and accuracy >= .96. A student has collapsed if its recall is below 0.8 of its teacher's.

Each training may cost {cfg.passes / 1e6:.2f} M forward passes of one image. A backward pass counts as 2, a backward
pass to the input alone as 1, an encoder as its share of the network, and stored pairs as the calls that made them.
`benchmarks/results.py` counts the passes of one step and gives each method the steps that fit. **passes** is what the
training of a row cost. It differs from the budget where the run took its own number of steps. These methods share the
budget between several runs: {"; ".join(several) or "none"}.

""" + "\n".join([*lines, "", f"Not run: {', '.join(missing) or 'none'}.", "", "## When to choose which", "", *words])


def stored_rows(cfg: Results, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of docs/digits.json that stay: methods that are not in cfg.methods and have no runs here, with teachers.

    ValueError if another protocol measured them.
    """
    file = cfg.docs / "digits.json"
    mine = {*cfg.methods, *(row["model"] for row in rows if row["kind"] != "teacher")}
    known = json.loads(file.read_text())["runs"] if file.is_file() else []
    known = [row for row in known if row["model"] not in mine]
    if all(row["kind"] == "teacher" for row in known):
        return []
    for key in ("protocol_hash", "n"):
        if other := {row[key] for row in known} - {row[key] for row in rows}:
            raise ValueError(f"{file} has rows of {key} {other.pop()}, which differs here: train all methods anew")
    return known


def publish(rows: list[dict[str, Any]], floor: float, cfg: Results) -> Path:
    """Write the documents from the rows of all runs and of docs/digits.json, and the page from the runs; its path."""
    from eval.leaderboard import tables
    from eval.leaderboard.commands import write_page

    own = summary(rows)
    stored = stored_rows(cfg, rows)
    known = {(row["model"], row["steps"], row["run"]) for row in stored}
    rows = [*stored, *(row for row in rows if (row["model"], row["steps"], row["run"]) not in known)]
    table = summary(rows)
    cfg.docs.mkdir(exist_ok=True)
    (cfg.docs / "digits.md").write_text(markdown(table, floor, cfg) + "\n")
    lines = lambda rows: ",\n".join(json.dumps(row | {"samples": None}) for row in rows)
    text = f'{{"floor": {floor},\n"rows": [\n{lines(table)}],\n"runs": [\n{lines(rows)}]}}\n'
    (cfg.docs / "digits.json").write_text(text)
    seeds = trained(cfg)
    noises = len(cfg.noises)
    several = [row for row in own if len(row["runs"]) > 1] or own
    shown = dict.fromkeys(row["model"] for row in several)
    logs = {m: runs(cfg, m, seeds[0])[-1] / "log.jsonl" for m in shown}
    lead = (
        f"Means and 95 % intervals over up to {len(seeds)} training seeds, {noises} sets of {cfg.n:,} images each. The "
        "dashed line is the distance of two sets of real digits. Pictures and curves are of the first seeds."
    )
    rows = [*several, tables.real_images_row(table[0], "real digits", fd_heldout=floor)]
    return write_page(cfg.output_dir, rows, "One-step students of handwritten digits", lead, logs)


def main(cfg: Results) -> None:
    if unknown := set(cfg.methods) - set(METHODS):
        fail(f"recipes/digits.py has no values for {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    os.environ["DISTILL_CACHE"] = f"{cfg.output_dir / 'cache'}"
    try:
        run_jobs(jobs(cfg), cfg.output_dir, cfg.workers)
    except RuntimeError as error:
        fail(str(error))
    import torch

    torch.set_num_threads(1)  # two threads on a busy machine of two cores can be fifty times slower than one
    from distill.data import digits
    from eval.figures import score_folder
    from eval.images import images
    from eval.leaderboard.commands import print_tables

    rows = measure(cfg)
    images.write_folder(cfg.output_dir / "samples" / "real", *digits("train"), overwrite=True, name="real digits")
    floor = score_folder(cfg.output_dir / "samples" / "real", metrics=("fd_heldout",))["metrics"]["fd_heldout"]["value"]
    print_tables(publish(rows, floor, cfg))


if __name__ == "__main__":
    main(tyro.cli(Results, use_underscores=True, description=__doc__))
