"""Logs of a run: values stay on the device and are fetched every few steps. Progress bar, log.jsonl, trackers,
grids."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import progress
from distill.files import read_text, write_atomically
from distill.training.config import TrainConfig
from distill.training.pictures import compare_rows, write_animation
from distill.training.state import State

LONGEST = 1 << 30  # maximum bytes of a log
REFERENCES = ("teacher", "step 0")  # rows of sample grids above that of the step, in this order

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from torch.utils.tensorboard import SummaryWriter


class Log:
    """Call it on every process with the state after every step. The main process writes means since the last line.

    A mean is over steps and processes. It is fetched from the device once per line.
    log.jsonl: one JSON object per line with "step", "seconds" and every logged value.
    """

    def __init__(self, cfg: TrainConfig, accelerator: Accelerator, step: int = 0) -> None:
        self.cfg = cfg
        self.accelerator = accelerator
        self.path = Path(cfg.output_dir) / "log.jsonl"
        self.samples = self.path.parent / "samples"
        references = self.samples / "references.safetensors"
        stored = load_file(references) if step and references.is_file() else {}
        self.references = {name: stored[name] for name in REFERENCES if name in stored}  # rows of every grid
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        main = accelerator.is_main_process
        kept = [line for line in self._lines() if line["step"] <= step] if main else []
        self.start = time.perf_counter() - (kept[-1]["seconds"] if kept else 0.0)
        self.last = (step, time.perf_counter())  # step and time of the last line
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
            values |= self._describe_progress(state)
        self._track(lambda tracker: tracker.log(values, step=state.step))

    def _describe_progress(self, state: State) -> dict[str, float]:
        """For trackers: learning rates, images per second since the last line, and the peak memory of this process."""
        now = time.perf_counter()
        images = (state.step - self.last[0]) * self.cfg.train_batch_size
        values = {
            f"{player}/learning_rate": rate * self.cfg.rate(state.step - 1) for player, rate in self.cfg.rates().items()
        }
        values = {name: rate for name, rate in values.items() if name.partition("/")[0] in state.optimizers}
        values["images_per_second"] = images / max(now - self.last[1], 1e-9)
        self.last = (state.step, now)
        device = self.accelerator.device
        if device.type == "cuda":  # counted on the host, without waiting for the device
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return values

    def add_reference(self, name: str, x: Tensor) -> None:
        """Keep images [B, C, H, W] or videos in [-1, 1] as a row of every later grid, also of a resumed run."""
        if self.accelerator.is_main_process:
            self.references[name] = x.contiguous()
            self.samples.mkdir(exist_ok=True)
            save_file(self.references, self.samples / "references.safetensors")

    def images(self, x: Tensor, step: int, captions: Sequence[str]) -> None:
        """Write a grid of images [B, C, H, W] or videos in [-1, 1] to samples/step-N.png and to every tracker.

        Its rows are the references and x. captions: the prompts of the images. Videos are also written as step-N.gif.
        """
        if not self.accelerator.is_main_process:
            return
        self.samples.mkdir(exist_ok=True)
        picture = compare_rows({**self.references, f"step {step}": x}, captions)
        picture.save(self.samples / f"step-{step:06d}.png")
        animation = self.samples / f"step-{step:06d}.gif"
        if x.ndim == 5:
            write_animation(x, animation)

        def show(tracker: GeneralTracker) -> None:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")
                if x.ndim == 5:
                    show_animation(tracker.writer, animation, step)
            elif tracker.name == "wandb":
                import wandb

                video = {"video": wandb.Video(f"{animation}", format="gif")} if x.ndim == 5 else {}
                tracker.log({"samples": wandb.Image(picture), **video}, step=step)

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


def show_animation(writer: SummaryWriter, file: Path, step: int) -> None:
    """Give TensorBoard an animated GIF as it is: `add_video` would need moviepy to write one."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(file) as picture:
        width, height = picture.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.read_bytes())
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag="video", image=image)]), step)


def _entry(text: str) -> dict[str, float] | None:
    """The values of a log's line; None if the line is invalid."""
    try:
        line = json.loads(text)
        numbers = float(line["step"]), float(line["seconds"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return line if all(map(math.isfinite, numbers)) else None
