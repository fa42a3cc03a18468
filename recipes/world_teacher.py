"""Train the teacher of the captioned world: a StableDiffusionPipeline that draws one object, or two in a relation.

`accelerate launch recipes/world_teacher.py` or `python recipes/world_teacher.py`; values ours.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
import yaml
from safetensors import SafetensorError
from torch import Tensor

from distill.configuration import fail
from distill.diffusion.schedule import Schedule
from distill.diffusion.times import TimeDistribution
from distill.files import folder_lock, write_atomically
from distill.layout import program_name
from distill.random import Draw
from distill.ranges import Count, Positive, Seed, UnitInterval, Weight, validate_ranges
from distill.roles import Batch
from distill.training.checkpoint import describe_disk_error
from distill.training.config import TrainConfig
from eval.world import World, load_world


@dataclass(frozen=True)
class Teacher:
    """How to train the teacher."""

    output_dir: str = "runs/world/teacher"  # the pipeline folder that is written
    world: str = "world"  # world: one object; world-two: two objects in a relation
    side: Count = 16  # pixels of an image's side, a multiple of 8
    max_train_steps: Count = 2700
    train_batch_size: Count = 64
    learning_rate: Positive = 2e-3  # of AdamW; constant, then to 0 over the last half
    channels: tuple[Count, ...] = (16, 32, 64)  # of the UNet's levels: multiples of 16
    p_drop: UnitInterval = 0.1  # share of samples trained without their caption, for guidance
    high_share: UnitInterval = 0.6  # share of noise levels drawn from [high_start, 1] instead of [0, 1]; below 1
    high_start: UnitInterval = 0.55  # below 1
    ema_half_life: Weight = 4400  # images
    seed: Seed = 0


@dataclass(frozen=True)
class HighNoise(TimeDistribution):
    """t uniform in [0, 1], or, with probability `share`, in [start, 1], where an image's layout is decided."""

    share: float
    start: float

    def __call__(self, draw: Draw, name: str, B: int, schedule: Schedule) -> Tensor:
        u = draw.uniform(name, (B,)).double()
        low = 1 - self.share  # density below start
        high = low + self.share / (1 - self.start)
        return torch.where(u < low * self.start, u / low, self.start + (u - low * self.start) / high)


@dataclass(frozen=True)
class WorldImages:
    """New images of the training scenes at every step. input_ids [N, L]: the tokens of each scene's caption."""

    world: World
    input_ids: Tensor
    scale: float

    def __call__(self, draw: Draw) -> Batch:
        scenes = self.world.splits["train"]
        pick = draw.integers("real", len(scenes)).cpu()
        variation = draw.uniform("variation", (len(pick), self.world.variations)).cpu() * 2 - 1
        images = self.scale * self.world.render(scenes[pick], variation)
        ids = self.input_ids[pick].to(draw.device)
        return {"c": {"input_ids": ids}, "real": images.to(draw.device), "real_c": {"input_ids": ids}}


def main(cfg: Teacher) -> None:
    out = Path(cfg.output_dir)
    if (out / "model_index.json").exists():
        fail(f"{out} already holds a teacher: choose another --output_dir or remove it")
    try:
        validate_ranges(cfg, "--")
        if max(cfg.high_share, cfg.high_start) == 1:
            raise ValueError("--high_share and --high_start must be below 1")
        if any(width % 16 for width in cfg.channels):
            raise ValueError(f"--channels is {cfg.channels}; it must be multiples of 16, as 16 32 64")
        if cfg.side % 2 ** (len(cfg.channels) - 1):
            raise ValueError(
                f"--side is {cfg.side}: {len(cfg.channels)} levels need a multiple of {2 ** (len(cfg.channels) - 1)}"
            )
        world = load_world(cfg.world, cfg.side)
        settings = TrainConfig(
            output_dir=cfg.output_dir,
            max_train_steps=cfg.max_train_steps,
            train_batch_size=cfg.train_batch_size,
            learning_rate=cfg.learning_rate,
            lr_scheduler="linear",
            lr_warmup_steps=50,
            adam_beta1=0.9,
            adam_beta2=0.99,
            adam_weight_decay=0.01,
            max_grad_norm=1.0,
            ema_half_life=cfg.ema_half_life,
            seed=cfg.seed,
        )
        with folder_lock(out):
            train_teacher(cfg, world, settings, out)
    except (ValueError, FloatingPointError) as error:
        fail(str(error))
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if not (why := describe_disk_error(error)):
            raise
        fail(f"{why}, and give the same command again")


def train_teacher(cfg: Teacher, world: World, settings: TrainConfig, out: Path) -> None:
    """Train UNet and text encoder together, and write the pipeline folder."""
    from accelerate.utils import set_seed

    from distill.diffusion.denoiser import Denoiser
    from distill.methods import Denoise
    from distill.training.build import build
    from distill.training.log import Log
    from distill.training.loop import train
    from pipelines.families import schedulers
    from pipelines.launch import silence_libraries, start_accelerator
    from recipes import world_model as model

    silence_libraries()
    set_seed(cfg.seed)
    accelerator = start_accelerator()
    if accelerator.is_main_process:
        write_atomically(
            out / "config.yaml", yaml.safe_dump(asdict(cfg) | {"channels": [*cfg.channels]}, sort_keys=False)
        )
    tokenizer = model.build_tokenizer(world.vocabulary)
    net = model.CaptionedUNet(model.build_unet(cfg.side, cfg.channels), model.build_text_encoder(tokenizer))
    null = {"input_ids": model.encode_captions(tokenizer, [""])}
    denoiser = Denoiser(net, *schedulers.table(model.build_scheduler()), null=null)
    data = WorldImages(world, model.encode_captions(tokenizer, world.captions()), model.SCALE)
    method = Denoise(cfg.p_drop, HighNoise(cfg.high_share, cfg.high_start))
    log = Log(settings, accelerator)
    for state in train(method, build(method, denoiser, (3, cfg.side, cfg.side)), data, settings, accelerator):
        log(state)
    log.close()
    if accelerator.is_main_process:
        facts = {"student": False, "world": cfg.world, "side": cfg.side, "config": asdict(cfg)}
        write_atomically(out / "distill.json", json.dumps(facts))
        try:
            model.build_pipeline(state.ema.net, tokenizer, cfg.side).save_pretrained(out)
        except BaseException:  # a full disk, say: half a teacher is none
            (out / "model_index.json").unlink(missing_ok=True)
            raise


if __name__ == "__main__":
    main(tyro.cli(Teacher, use_underscores=True, description=__doc__, prog=program_name()))
