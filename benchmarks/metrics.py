"""Speed of the metrics: features and FID of digit images against the peers' route, the Frechet step against sqrtm.

.venv/bin/python benchmarks/metrics.py                 the section "Speed" of docs/metrics.md
.venv/bin/python benchmarks/metrics.py --n 1000 --width 256 --docs some/other.md
.venv/bin/python benchmarks/metrics.py --seeds runs/results/samples/teacher-35-0-*       spread against intervals
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import tyro

HEADING = "## Speed\n"
ROUNDS = 3


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    n: int = 10_000  # digit images
    width: int = 2048  # features of the Frechet step
    docs: Path = Path("docs/metrics.md")  # its section "Speed" is replaced
    seeds: tuple[Path, ...] = ()  # folders of digits that differ in the noise alone: their spread is printed instead


def timed(**calls: Callable[[], Any]) -> dict[str, tuple[float, Any]]:
    """The least CPU seconds of this process over interleaved rounds, which a busy machine disturbs little; results."""
    found: dict[str, tuple[float, Any]] = {}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.process_time()
            result = call()
            found[name] = min(time.process_time() - began, found.get(name, (math.inf,))[0]), result
    return found


def memory() -> float:
    """The peak of this process's memory in MiB, and a new start of it."""
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def digit_images(n: int) -> torch.Tensor:
    """Training digits in random order, moved by up to a pixel, with a little noise: n different images."""
    from distill.data import digits
    from eval.features.digits import shift_images

    draw = torch.Generator().manual_seed(0)
    images = digits("train")[0]
    pick = images[torch.randint(len(images), (n,), generator=draw)]
    moved = shift_images(pick, torch.randint(-1, 2, (n, 2), generator=draw))
    return moved + 0.05 * torch.randn(moved.shape, generator=draw)


def folders_to_fid(n: int, where: Path) -> tuple[list[tuple[str, float, float]], str]:
    """(what, seconds, over the peer's route) of features and FID of n digit images, from files; a word on memory."""
    from cleanfid.fid import frechet_distance, get_folder_features

    from eval.features.extraction import features
    from eval.features.extractors import load
    from eval.figures import digits_reference
    from eval.images import images as folders
    from eval.metrics.frechet import fid

    folders.write_folder(where / "images", digit_images(n))
    net = load("digits")
    real = digits_reference("heldout")
    levels = folders.quantize(digit_images(n)).float()
    features(where / "images", net, first=64)  # imports, and the first pages of the disk's cache
    memory()
    fid(features(where / "images", net, first=n // 5), real)
    fewer = memory()
    found = features(where / "images", net)
    score = fid(found, real)
    used = memory()

    def afresh() -> float:
        shutil.rmtree(Path(os.environ["DISTILL_CACHE"]) / "features")
        return fid(features(where / "images", net), real).value

    def peer() -> float:
        how: dict[str, Any] = {"num_workers": 0, "batch_size": 64, "device": torch.device("cpu"), "verbose": False}
        theirs = get_folder_features(
            str(where / "images"), lambda x: net.net(x[:, :1])["features"], mode="legacy_tensorflow", **how
        )
        moments = [m for x in (theirs, real.numpy()) for m in (x.mean(0), np.cov(x, rowvar=False))]
        return frechet_distance(*moments)

    runs = timed(
        peer=peer,
        ours=afresh,
        again=lambda: fid(features(where / "images", net), real).value,
        fid=lambda: fid(found, real).value,
        bare=lambda: [net.net(x) for x in levels.split(64)],
    )
    assert abs(runs["peer"][1] - score.value) < 1e-3 * score.value and runs["ours"][1] == score.value
    names = {
        "peer": f"clean-fid: {n:,} images to FID, the same network",
        "ours": "ours: features to disk, FID with its interval",
        "again": "ours again, from the cache",
        "fid": "ours: FID with its interval alone",
        "bare": "the network alone, of images in memory",
    }
    words = f"Peak memory of features and FID of {n:,} images: {used - fewer:+.1f} MiB over that of {n // 5:,}."
    return [(names[key], seconds, seconds / runs["peer"][0]) for key, (seconds, _) in runs.items()], words


def frechet_step(width: int) -> list[tuple[str, float, float]]:
    """(what, seconds, over sqrtm's) of the Frechet distance of two covariances of 2 `width` samples."""
    from scipy.linalg import sqrtm

    from eval.metrics.frechet import fid, frechet, moments

    draw = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    sets = [torch.randn(2 * width, width, generator=draw, dtype=torch.float64) * scale * s for s in (1.0, 1.2)]
    a = moments(sets[0])
    b = moments(sets[1])

    def peer() -> float:
        root = sqrtm(a.cov.numpy() @ b.cov.numpy()).real
        return float(((a.mean - b.mean) ** 2).sum() + a.cov.trace() + b.cov.trace() - 2 * np.trace(root))

    runs = timed(peer=peer, ours=lambda: frechet(a, b), whole=lambda: fid(sets[0], b).value)
    expected = runs["peer"][1]
    assert all(abs(value - expected) < 1e-6 * expected for _, value in runs.values())
    names = {
        "peer": f"scipy's sqrtm at {width} dimensions",
        "ours": "ours: two symmetric eigen-decompositions",
        "whole": f"ours: moments of {2 * width:,} images, distance and interval",
    }
    return [(names[key], seconds, seconds / runs["peer"][0]) for key, (seconds, _) in runs.items()]


def spread(folders: tuple[Path, ...]) -> str:
    """A Markdown table: a figure's standard deviation over folders, and the standard error that its intervals claim."""
    from statistics import fmean, stdev

    from eval.figures import score_folder
    from eval.metrics.intervals import Z

    rows = [score_folder(folder, "digits")["metrics"] for folder in folders]
    lines = ["| figure | mean | standard deviation over seeds | standard error of one interval |", "|---|---|---|---|"]
    for name in rows[0]:
        values = [row[name]["value"] for row in rows]
        claimed = fmean((row[name]["high"] - row[name]["low"]) / 2 / Z for row in rows)
        lines.append(f"| {name} | {fmean(values):.3f} | {stdev(values):.4f} | {claimed:.4f} |")
    return "\n".join(lines)


def table(rows: list[tuple[str, float, float]], against: str) -> str:
    lines = [f"| what | CPU seconds | over {against} |", "|---|---|---|"]
    for what, seconds, ratio in rows:
        lines.append(f"| {what} | {seconds:.2f} | {ratio:.3f} |")
    return "\n".join(lines)


def main(cfg: Bench) -> None:
    from rich.console import Console

    torch.set_num_threads(1)
    if cfg.seeds:
        return Console().print(spread(cfg.seeds), highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        from eval.features.digits import classifier

        classifier()  # from the user's cache, or trained before the clock runs
        os.environ["DISTILL_CACHE"] = f"{folder}/cache"
        first, memory_line = folders_to_fid(cfg.n, Path(folder))
    second = frechet_step(cfg.width)
    text = (
        f"{HEADING}\n`python benchmarks/metrics.py`: {platform.machine()} CPU, one thread, torch {torch.__version__}, "
        f"CPU seconds, the least of {ROUNDS} rounds.\n\n"
        f"{table(first, 'clean-fid')}\n\n{memory_line}\n\n{table(second, 'sqrtm')}\n"
    )
    before = cfg.docs.read_text().partition(HEADING)[0] if cfg.docs.is_file() else ""
    cfg.docs.parent.mkdir(parents=True, exist_ok=True)
    cfg.docs.write_text(before + text)
    Console().print(text, highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Bench, use_underscores=True, description=__doc__))
