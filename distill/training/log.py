"""Logs of a run: values stay on the device and are fetched every few steps. Progress bar, log.jsonl, trackers,
grids."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distill import progress
from distill.files import read_text, write_atomically
from distill.training.config import TrainConfig
from distill.training.state import State

LONGEST = 1 << 30  # maximum bytes of a log

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from PIL.Image import Image


class Log:
    """Call it on every process with the state after every step. The main process writes means since the last line.

    A mean is over steps and processes. It is fetched from the device once per line.
    log.jsonl: one JSON object per line with "step", "seconds" and every logged value.
    """

    def __init__(self, cfg: TrainConfig, accelerator: Accelerator, step: int = 0) -> None:
        self.cfg = cfg
        self.accelerator = accelerator
        self.path = Path(cfg.output_dir) / "log.jsonl"
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        main = accelerator.is_main_process
        kept = [line for line in self._lines() if line["step"] <= step] if main else []
        self.start = time.perf_counter() - (kept[-1]["seconds"] if kept else 0.0)
        if main:
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.bar = progress.bar(cfg.max_train_steps, "step", shown=main, first=step, leave=True)

    def _lines(self) -> list[dict[str, float]]:
        """The lines of earlier processes, without a last line that is incomplete."""
        texts = read_text(self.path, LONGEST).splitlines() if self.path.exists() else []
        lines = [_entry(text) for text in texts]
        if lines and lines[-1] is None:
            lines.pop()
        if None in lines:
            raise ValueError(f"{self.path} is damaged in line {lines.index(None) + 1}: delete that line, or the file")
        return [line for line in lines if line is not None]

    def __call__(self, state: State) -> None:
        if not state.logs:  # a finished run that is resumed
            return
        for name, value in state.logs.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1
        self.bar.update()
        if state.step % self.cfg.logging_steps and state.step != self.cfg.max_train_steps:
            return
        means = torch.stack([(total / self.counts[name]).float() for name, total in self.sums.items()])
        values = dict(zip(self.sums, self.accelerator.reduce(means, "mean").tolist(), strict=True))
        self.sums = {}
        self.counts = {}
        if self.accelerator.is_main_process:
            line = {"step": state.step, "seconds": round(time.perf_counter() - self.start, 3), **values}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k.endswith("/loss")})
        self._track(lambda tracker: tracker.log(values, step=state.step))

    def images(self, x: Tensor, step: int, columns: int = 10) -> None:
        """Write a grid of images [B, C, H, W] or videos in [-1, 1] to samples/step-N.png and to every tracker."""
        if not self.accelerator.is_main_process:
            return
        picture = grid(x, columns)
        folder = self.path.parent / "samples"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step-{step:06d}.png")

        def show(tracker: GeneralTracker) -> None:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            elif tracker.name == "wandb":
                import wandb

                tracker.log({"samples": wandb.Image(picture)}, step=step)

        self._track(show)

    def close(self) -> None:
        self.bar.close()
        self._track(lambda tracker: tracker.finish())
        self.accelerator.trackers.clear()
        self.accelerator.end_training()

    def _track(self, tell: Callable[[GeneralTracker], None]) -> None:
        """Send to every tracker. One that fails is not used again, and the run continues: log.jsonl has every line."""
        for tracker in [*self.accelerator.trackers]:
            try:
                tell(tracker)
            except Exception as error:
                self.accelerator.trackers.remove(tracker)
                sys.stderr.write(f"\n{tracker.name} has failed ({error}): the run goes on without it\n")


def grid(x: Tensor, columns: int = 10, side: int = 32) -> Image:
    """Images [B, C, H, W] in [-1, 1], C = 1 or 3, as one picture. Small ones are enlarged to about `side` pixels.

    A video [B, C, T, H, W] is shown by its first, middle and last frame, side by side.
    """
    from PIL import Image

    if x.ndim == 5:
        x = torch.cat(x[:, :, [0, x.shape[2] // 2, -1]].unbind(2), dim=-1)

    pixels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    scale = max(1, side // pixels.shape[1])
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    B, H, W, C = pixels.shape
    rows = -(-B // columns)
    canvas = np.full((rows * columns, H, W, C), 255, np.uint8)
    canvas[:B] = pixels
    canvas = canvas.reshape(rows, columns, H, W, C).transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, C)
    return Image.fromarray(canvas.squeeze(-1) if C == 1 else canvas)


def _entry(text: str) -> dict[str, float] | None:
    """The values of a log's line; None if the line is invalid."""
    try:
        line = json.loads(text)
        numbers = float(line["step"]), float(line["seconds"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return line if all(map(math.isfinite, numbers)) else None
