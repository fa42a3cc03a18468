"""Select the best checkpoint on a selection split and report its metrics on a disjoint test split.

python -m eval.watch runs/dmd2                       the existing checkpoints
python -m eval.watch runs/dmd2 --follow              and future ones, until the run has ended

Papers select the best checkpoint by the metric that they report. The search biases that figure downwards. Here the
selection split and the test split share no noise, no prompt and no real image. Of a protocol's prompts and real images
the odd ones select and the even ones test; of the digits the training scans select and the held-out scans test.
RUN/watch holds a page, watch.json and the chosen export. The export's card has the figures of the test split.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from distill.layout import module_name
from distill.training import checkpoint
from eval.cli import PartialFailure
from eval.files import write_json
from eval.leaderboard.commands import card_results, print_tables, write_page
from eval.leaderboard.entries import Flags, command_line_flags, read_json_or_none, read_mean_row
from eval.leaderboard.jobs import Job
from eval.leaderboard.jobs import run_jobs as run_jobs
from eval.leaderboard.tables import Row, better_values, interval, metric_label
from eval.protocol import Protocol
from eval.protocols import find_protocol
from pipelines.export.card import add_results

Scored = tuple[list[Row], dict[str, str]]  # rows, and {name: why} of what failed
SEED = 1_000_000  # of the selection's noise: no protocol's
NAMES = ("test", "selection")  # of the splits: the even half, the odd half


@dataclass(frozen=True)
class Split:
    """The noise seeds and the flags of one of the two splits."""

    name: str  # selection or test
    seeds: tuple[int, ...]
    generate: Flags  # flags
    score: Flags


def make_splits(
    p: Protocol, out: Path, metric: str | None, n: int | None, reference: Path | None
) -> tuple[Split, Split]:
    """(selection, test) of a protocol, disjoint in noise, prompts and real images. The halves are written to `out`.

    metric: selects; by default the protocol's first. n: images of the selection. reference: real images for the
    selection, if the protocol has only statistics, which cannot be halved. ValueError if the splits would overlap.
    """
    if not set(p.seeds).isdisjoint({SEED}):
        raise ValueError(f"protocol {p.name} uses seed {SEED}, the selection's; choose another protocol")
    if p.name == "digits":
        if reference is not None:
            raise ValueError(f"reference is {reference}, but the digits have two sets of real images; leave it out")
        return _make_digits_splits(p, metric, n)
    names = list(dict.fromkeys(m.metric for m in p.measures))
    _require_halves(p, names, metric, reference)
    selection = {"protocol": p.address, "metrics": [metric or names[0]], **_reference_flag(p, out, reference, 1)}
    test = {"protocol": p.address, "metrics": names, **_reference_flag(p, out, reference, 0)}
    return (
        Split("selection", (SEED,), {"n": n, **_condition_flags(p, out, 1)}, selection),
        Split("test", p.seeds, _condition_flags(p, out, 0), test),
    )


def _require_halves(p: Protocol, names: Sequence[str], metric: str | None, reference: Path | None) -> None:
    """ValueError if the metric is none of the protocol's, or if its data are absent or cannot be halved."""
    if metric is not None and metric not in names:
        raise ValueError(f"metric is {metric}; protocol {p.name} measures {', '.join(names)}")
    p.require(reference=reference is None)
    if reference is not None and not reference.is_dir() and p.reference_path is None:
        raise ValueError(f"reference is {reference}; it must be a folder of real images, half for each split")
    if p.components and p.classes is None:
        raise ValueError(f"protocol {p.name} replaces components of the pipeline; choose one without that")
    path = p.reference_path
    if path is not None and not path.is_dir() and reference is None:
        raise ValueError(
            f"the reference of protocol {p.name}, {path}, is statistics, which cannot be halved: pass --reference, a "
            "folder of real images that it was not made of"
        )


def _make_digits_splits(p: Protocol, metric: str | None, n: int | None) -> tuple[Split, Split]:
    """Both splits of the real digits are built in, each with a measure of its own."""
    if metric not in (None, "fd_train", "accuracy"):
        raise ValueError(f"metric is {metric}; on the digits fd_train or accuracy may select: the others test")
    flags: Flags = {"protocol": p.name}
    tests = ["fd_heldout", "accuracy"] if metric is None else ["fd_heldout"]
    return (
        Split("selection", (SEED,), flags | {"n": n}, flags | {"metrics": [metric or "fd_train"]}),
        Split("test", p.seeds, flags, flags | {"metrics": tests}),
    )


def _condition_flags(p: Protocol, out: Path, odd: int) -> Flags:
    """The flags of eval.generate: every other prompt of the protocol, in a file, or its labels."""
    if p.classes is not None:
        return {"protocol": p.address}
    file = out / NAMES[odd] / "prompts.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for text in p.conditions()[:: p.per_prompt][odd::2]]
    if not lines:
        raise ValueError(f"protocol {p.name} has one prompt, which cannot be halved; give it more")
    file.write_text("\n".join(lines) + "\n")
    return {"prompts": file} if p.per_prompt == 1 else {"prompts": file, "per_prompt": p.per_prompt}


def _reference_flag(p: Protocol, out: Path, reference: Path | None, odd: int) -> Flags:
    """The real images of a split: every other image of the protocol's folder, or of `reference` if it has none.

    If it has one, `reference` selects and the protocol's own test.
    """
    path = p.reference_path or reference
    if reference is not None and p.reference_path is not None:
        return {"reference": reference} if odd else {}
    if path is None or not path.is_dir():
        return {}
    return {"reference": _half(path, out / NAMES[odd] / "reference", odd)}


def _half(folder: Path, out: Path, odd: int) -> Path:
    """Links to every other image of a folder."""
    from eval.features.extraction import list_images

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for i, file in enumerate(list_images(folder)):
        if i % 2 == odd:
            os.symlink(file.resolve(), out / f"{i:08d}{file.suffix}")
    return out


def score_models(models: dict[str, Path], split: Split, out: Path, exports: dict[str, Job]) -> Scored:
    """(a row for each model, {name: reason} of the failed ones): exported where `exports` says so, sampled, scored."""
    todo: dict[str, Job] = {}
    files = {name: out / name / f"{split.name}.json" for name in models}
    for name, model in models.items():
        if not _is_scored(files[name], len(split.seeds)):
            todo |= _model_jobs(name, model, split, files[name], exports)
    failed = run_jobs(todo, out, 1, patient=True) if todo else {}
    rows: list[Row] = []
    for name, path in files.items():
        if f"{name}-{split.name}" in failed:
            path.unlink(missing_ok=True)  # of some seeds alone
        elif path.is_file():
            try:
                row = read_mean_row(path)
            except ValueError as error:
                failed[f"{name}-{split.name}"] = str(error)
                path.unlink()
                continue
            marked = {"protocol": f"{row['protocol']}, {split.name}"}
            marked["protocol_hash"] = f"{row['protocol_hash']}:{split.name}"
            rows.append({**row, **marked, "model": name})
    return rows, {name: reason for name, reason in failed.items() if not reason.startswith("needs ")}


def _model_jobs(name: str, model: Path, split: Split, file: Path, exports: dict[str, Job]) -> dict[str, Job]:
    """The jobs that export a model, sample it with each seed and write its rows to `file`."""
    todo: dict[str, Job] = {}
    after: tuple[str, ...] = ()
    if name in exports and not (model / "model_index.json").is_file():
        todo[f"{name}-export"] = exports[name]
        after = (f"{name}-export",)
    folders = {seed: file.parent / f"{split.name}-{seed}" for seed in split.seeds}
    for seed, folder in folders.items():
        options = {"model": model, "out": folder, "name": name, "seed": seed, **split.generate}
        command = ["-m", module_name("eval.generate"), "--overwrite", *command_line_flags(options)]
        todo[f"{name}-{split.name}-{seed}"] = Job(f"sample {name}, {split.name} {seed}", command, after)
    options = {"folder": list(folders.values()), "out": file, **split.score}
    samples = tuple(f"{name}-{split.name}-{seed}" for seed in split.seeds)
    command = ["-m", module_name("eval.score"), *command_line_flags(options)]
    todo[f"{name}-{split.name}"] = Job(f"score {name}, {split.name}", command, samples)
    return todo


def _is_scored(path: Path, seeds: int) -> bool:
    """Whether a file holds a row for every seed. A killed command leaves fewer."""
    rows = read_json_or_none(path)
    return isinstance(rows, list) and len(rows) >= seeds


def best_row(rows: Sequence[Row]) -> tuple[Row, list[str]]:
    """(the row with the best first metric, the models whose intervals overlap with its interval)."""
    name = next(iter(rows[0]["metrics"]))
    better = better_values(name, rows)
    if better is None:
        raise ValueError(
            f"metric {name} has no better values, so it cannot choose a checkpoint; name another by --metric"
        )
    sign = 1 if better == "lower" else -1
    chosen = min(rows, key=lambda row: sign * row["metrics"][name]["value"])
    low, high = interval(chosen["metrics"][name])
    spans = {row["model"]: interval(row["metrics"][name]) for row in rows if row is not chosen}
    return chosen, [model for model, (a, b) in spans.items() if a <= high and low <= b]


def select_checkpoint(
    run: Annotated[Path, tyro.conf.Positional],
    protocol_name: Annotated[str, tyro.conf.arg(name="protocol")] = "digits",
    metric: str | None = None,
    n: int | None = None,
    reference: Path | None = None,
    follow: bool = False,
    every: float = 30.0,
) -> Path:
    """Score the checkpoints of a run on the selection split, the chosen one on the test split; the page's path.

    What is scored is kept: the command may be stopped, and started again when there are more checkpoints.

    Args:
        run: the run's folder, with its config.yaml and checkpoint-N.
        protocol_name: what is measured: a name (python -m eval.protocols) or a .yaml file.
        metric: what selects; by default the protocol's first, of the digits fd_train.
        n: images for the selection of each checkpoint; by default as many as the protocol says or has prompts for.
        reference: a folder of real images for the selection, where the protocol's own cannot be halved. If the protocol
            has none, half of the folder selects and half tests.
        follow: wait for more checkpoints until the run has ended.
        every: seconds between two looks.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"no run at {str(run)!r}: a run's folder has a config.yaml")
    out = run / "watch"
    select, test = make_splits(find_protocol(protocol_name), out, metric, n, reference)
    request = json.loads(json.dumps([find_protocol(protocol_name).hash, metric, n, str(reference)]))
    if read_json_or_none(out / "asked.json") != request:  # figures of another request are not compared with these
        for old in out.glob("checkpoint-*/*.json"):
            old.unlink()
    write_json(out / "asked.json", request)
    while True:
        ended = (run / "pipeline" / "model_index.json").is_file()
        rows, failed = _selection(run, out, select)
        if ended or not follow:
            break
        time.sleep(every)
    if not rows:
        reason = "; ".join(failed.values()) or f"{run} has no checkpoint-N"
        raise ValueError(f"no checkpoint of {run} was scored: {reason}")
    chosen, ties = best_row(rows)
    name = str(chosen["model"])
    model = out / name / "pipeline"
    tested, wrong = score_models({name: model}, test, out, {name: _export(run, name, model)})
    if wrong:
        raise ValueError("; ".join(wrong.values()))
    add_results(model, card_results(tested))
    first = next(iter(chosen["metrics"]))
    facts = {"chosen": name, "by": first, "ties": ties, "selection": rows, "test": tested[0], "failed": failed}
    write_json(out / "watch.json", facts)
    lead = f"{name} of {len(rows)} was chosen by {metric_label(first)} on the selection split{format_ties(ties)}. "
    lead += f"Its figures are those of the test split; its export is {model}."
    page = write_page(out, [*tested, *rows], f"Checkpoints of {run.name}", lead, failed=failed)
    if failed:
        print_tables(page)
        raise PartialFailure(f"{len(failed)} steps failed, the page is of the others: {'; '.join(failed.values())}")
    return page


def format_ties(ties: Sequence[str]) -> str:
    return f", a tie with {', '.join(ties)}" if ties else ""


def _export(run: Path, name: str, model: Path) -> Job:
    return Job(
        f"export {name}",
        ["-m", module_name("pipelines.export"), f"{run}", "--checkpoint", name, "--output_dir", f"{model}"],
    )


def _selection(run: Path, out: Path, split: Split) -> Scored:
    """The rows of all checkpoints so far. Checkpoints are scored one by one; only the best one's export is kept."""
    known = {path.parent.name for path in out.glob(f"checkpoint-*/{split.name}.json")}
    names = sorted(
        {f.name for f in checkpoint.list_intact_checkpoints(run)} | known, key=lambda name: int(name.split("-")[1])
    )
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in names:
        model = out / name / "pipeline"
        scored, wrong = score_models({name: model}, split, out, {name: _export(run, name, model)})
        rows = [*rows, *scored]
        failed = failed | wrong
        keep = str(best_row(rows)[0]["model"]) if rows else name
        for other in {name, *(str(row["model"]) for row in rows)} - {keep}:
            shutil.rmtree(out / other / "pipeline", ignore_errors=True)
    return rows, failed


def main() -> None:
    """Command line of `watch`."""
    from eval.cli import run

    page = run(select_checkpoint)
    print_tables(page)
    facts = json.loads((page.parent / "watch.json").read_text())
    sys.stderr.write(f"{facts['chosen']} was chosen by {facts['by']}{format_ties(facts['ties'])}\n")
