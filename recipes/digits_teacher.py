"""Train the teacher of the digits: a class-conditional EDM denoiser on scikit-learn's handwritten digits.

`accelerate launch recipes/digits_teacher.py` or `python recipes/digits_teacher.py`; values ours.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
import yaml
from safetensors import SafetensorError

from distill.configuration import fail
from distill.files import folder_lock, write_atomically
from distill.layout import program_name
from distill.ranges import Calls, Count, Finite, Positive, Seed, UnitInterval, Weight, validate_ranges
from distill.training.checkpoint import describe_disk_error
from distill.training.config import TrainConfig


@dataclass(frozen=True)
class Teacher:
    """How to train the teacher."""

    output_dir: str = "runs/digits/teacher"  # the pipeline folder that is written
    max_train_steps: Count = 2000
    train_batch_size: Count = 64
    learning_rate: Positive = 2e-3  # of AdamW; constant, then to 0 over the last half
    channels: tuple[Count, ...] = (16, 32)  # of the UNet's levels, one to four multiples of 8
    layers: Calls = 1  # residual blocks a level
    sigma_d: Positive = 0.75  # standard deviation of the pixels in [-1, 1]
    p_drop: UnitInterval = 0.1  # share of samples trained without their label, for guidance
    p_mean: Finite = -1.0  # of log sigma
    p_std: Positive = 1.2
    ema_half_life: Weight = 20_000  # images
    max_frequency: Positive = 2.5  # of the time embedding, per unit of ln sigma: sCM differentiates the network in time
    seed: Seed = 0


def main(cfg: Teacher) -> None:
    out = Path(cfg.output_dir)
    if (out / "model_index.json").exists():
        fail(f"{out} already holds a teacher: choose another --output_dir or remove it")
    try:
        validate_ranges(cfg, "--")
        if len(cfg.channels) > 4 or any(width % 8 for width in cfg.channels):
            raise ValueError(f"--channels is {cfg.channels}; it must be one to four multiples of 8, as 16 32")
        settings = TrainConfig(
            output_dir=cfg.output_dir,
            max_train_steps=cfg.max_train_steps,
            train_batch_size=cfg.train_batch_size,
            learning_rate=cfg.learning_rate,
            lr_scheduler="linear",
            lr_warmup_steps=20,
            adam_beta1=0.9,
            ema_half_life=cfg.ema_half_life,
            seed=cfg.seed,
        )
        with folder_lock(out):
            train_teacher(cfg, settings, out)
    except (ValueError, FloatingPointError) as error:
        fail(str(error))
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if not (why := describe_disk_error(error)):
            raise
        fail(f"{why}, and give the same command again")


def train_teacher(cfg: Teacher, settings: TrainConfig, out: Path) -> None:
    """Train the teacher and write its pipeline folder."""
    from accelerate.utils import set_seed

    from distill.data import Digits
    from distill.diffusion.times import LogNormal
    from distill.methods import Denoise
    from distill.training.build import build
    from distill.training.log import Log
    from distill.training.loop import train
    from pipelines.families import edm
    from pipelines.launch import silence_libraries, start_accelerator

    silence_libraries()
    set_seed(cfg.seed)
    accelerator = start_accelerator()
    if accelerator.is_main_process:
        write_atomically(out / "config.yaml", yaml.safe_dump(asdict(cfg), sort_keys=False))
    teacher = edm.teacher(edm.unet(cfg.channels, layers=cfg.layers), cfg.sigma_d, null_class=10)
    method = Denoise(cfg.p_drop, LogNormal(cfg.p_mean, cfg.p_std))
    log = Log(settings, accelerator)
    for state in train(method, build(method, teacher.denoiser, teacher.shape), Digits(), settings, accelerator):
        log(state)
        edm.smooth(state.nets.student.denoiser.net, cfg.max_frequency)
    log.close()
    if accelerator.is_main_process:
        edm.smooth(state.ema.net, cfg.max_frequency)  # the average saw every step before it was smoothed
        write_atomically(out / "distill.json", json.dumps({"student": False, "null_class": 10, "config": asdict(cfg)}))
        try:
            edm.pipeline(state.ema.net, cfg.sigma_d, teacher.denoiser.schedule.sigma_max, 1).save_pretrained(out)
        except BaseException:  # a full disk, say: half a teacher is none
            (out / "model_index.json").unlink(missing_ok=True)
            raise


if __name__ == "__main__":
    main(tyro.cli(Teacher, use_underscores=True, description=__doc__, prog=program_name()))
