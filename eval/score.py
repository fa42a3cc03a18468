"""Folders of images -> one row of figures each, under a protocol or with metrics of your choice.

python -m eval.score --folder runs/images/dmd2 runs/images/teacher --protocol digits --out runs/scores.json
python -m eval.score --folder runs/images/a --reference photos --metrics fid kid --extractor dinov2
python -m eval.score --folder runs/images/a --protocol own.yaml          eval/protocol_files.py

eval/figures.py says what a row holds. Missing inputs are reported before a library that takes time is imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from eval.cli import PartialFailure
from eval.files import check_output, write_json
from eval.inputs import format_reasons, require_inputs

ScoredRow = dict[str, Any]  # of one folder: see eval/figures.py


def is_main_process() -> bool:
    """Whether this is the process of a launch that writes files."""
    return int(os.environ.get("RANK", 0)) == 0


def score_folders(
    folder: tuple[Path, ...],
    out: Path | None = None,
    protocol: str | None = None,
    metrics: tuple[str, ...] = (),
    extractor: str | None = None,
    reference: Path | None = None,
    use: tuple[str, ...] = (),
    batch: int = 64,
    workers: int = 4,
    teacher: tuple[Path, ...] = (),
) -> list[ScoredRow]:
    """Score folders of images. If a folder or a metric fails, the others are scored, and the exit code is 1.

    Args:
        folder: one or more folders of images.
        out: where the rows go, as JSON.
        protocol: its name (python -m eval.protocols) or its .yaml file; by default the one that a folder was made for,
            for digits of 8 x 8 pixels digits.
        metrics: only these of the protocol; without a protocol, any of eval/metrics/registry.py, or your own .py files
            (eval/metrics/lookup.py).
        extractor: without a protocol: the extractor of all metrics, by default each one's own.
        reference: a folder of real images, or an .npz with mu and sigma, instead of the protocol's.
        use: EXTRACTOR=EXTRACTOR, for example to name local weights; rows carry the hash of what was used.
        batch: images per call of an extractor.
        workers: threads that read and resize.
        teacher: folders of the teacher's images, one for each seed: adds the drift from those of the same prompts and
            noise in chroma, contrast, mean and spread of each channel.
    """
    if not folder:
        raise ValueError("no folder was given; name at least one after --folder")
    if out is not None:
        check_output(out, "--out")
    if reference is not None and not reference.exists():
        raise ValueError(f"there is no {reference}; name a folder of real images, or an .npz with mu and sigma")
    _require_any_inputs(folder, protocol, metrics, extractor, reference, use, teacher)
    from distill.progress import track
    from eval.figures import FAILURES, describe_error, list_reference, score_folder

    if reference is not None:
        list_reference(reference)
    rows = []
    failed = []
    for path in track(folder, "folder", "score", len(folder) > 1):
        try:
            row = score_folder(path, protocol, metrics, extractor, reference, use, batch, workers, teacher)
        except FAILURES as error:
            why = describe_error(error)
            failed.append(why if f"{path}" in why else f"{path}: {why}")
            continue
        rows.append(row)
        if "left_out" in row:
            failed.append(f"{path} was scored without {format_reasons(row['left_out'])}")
        if out is not None and is_main_process():
            write_json(out, rows)  # a command that is killed has its rows so far
    if failed:
        count = f" ({len(rows)} of {len(folder)} folders were scored)" if len(folder) > 1 else ""
        message = "; ".join(failed) + count
        raise PartialFailure(message, rows) if rows else ValueError(message)
    return rows


def _require_any_inputs(folders: Sequence[Path], *request: Any) -> None:
    """ValueError if no folder can be scored. See `require_inputs`."""
    reasons = []
    for folder in folders:
        try:
            require_inputs(folder, *request)
        except ValueError as error:
            reasons.append(str(error) if f"{folder}" in str(error) else f"{folder}: {error}")
    if len(reasons) == len(folders):
        raise ValueError("; ".join(dict.fromkeys(reasons)))


def main() -> None:
    """Command line of `score_folders`."""
    from eval.cli import run

    @wraps(score_folders)
    def stage(*given: Any, **named: Any) -> None:
        try:
            print_tables(score_folders(*given, **named))
        except PartialFailure as error:
            print_tables(error.results)
            raise

    run(stage)


def print_tables(rows: list[ScoredRow]) -> None:
    """The rows as tables in the terminal."""
    from rich.console import Console

    from eval.leaderboard.tables import terminal_tables

    if is_main_process():
        for one in terminal_tables(rows):
            Console().print(one)


if __name__ == "__main__":
    main()
