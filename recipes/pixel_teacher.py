"""A teacher of your own images: a diffusion model in pixel space, class-conditional, saved as a diffusers pipeline.

`distill run pixel_teacher --images FOLDER`, or `accelerate launch recipes/pixel_teacher.py --images FOLDER`. FOLDER has
one subfolder a class, with any names; images may have any size. OUTPUT_DIR/teacher is the teacher, and has the names:
`distill train --method dmd2 --teacher OUTPUT_DIR/teacher --data.images FOLDER`. --resume_from_checkpoint latest goes on
with a run. Values ours, for small images.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from distill.configuration import Config, fail
from distill.data.labels import CLASS_NAMES, Labels, read_class_images
from distill.diffusion.times import Grid
from distill.files import rank, read_json, write_atomically
from distill.layout import program_name
from distill.methods import Denoise
from distill.ranges import Calls, Count, UnitInterval, validate_ranges
from distill.training.config import StudentConfig, TrainConfig
from pipelines import run
from pipelines.markdown import escape_markdown, fenced

if TYPE_CHECKING:
    from diffusers import ConsistencyModelPipeline

STEPS = 1000  # timesteps of the table of noise
NETWORK = ("resolution", "gray", "channels", "layers", "prediction")  # values of the network
VALUES = TrainConfig(
    output_dir="runs/pixel_teacher",
    max_train_steps=20_000,
    learning_rate=2e-4,
    lr_scheduler="linear",
    lr_warmup_steps=500,
    adam_beta1=0.9,
    max_grad_norm=1.0,
    ema_half_life=100_000,
    checkpointing_steps=1000,
    validation_steps=1000,
)


@dataclass(frozen=True)
class PixelTeacher:
    """The images, the network and its training."""

    images: str = ""  # folder of images with one subfolder a class; their names, sorted, are the labels 0, 1, ...
    resolution: Count = 32  # pixels per side; of an image the centre square is resized to it
    gray: bool = False  # one channel instead of three
    channels: tuple[Count, ...] = (64, 128, 128)  # of the UNet's levels, multiples of 8; the last one has attention
    layers: Calls = 2  # residual blocks a level
    prediction: Literal["v_prediction", "epsilon", "sample"] = "v_prediction"  # what the network predicts
    p_drop: UnitInterval = 0.1  # share of samples trained without their label, for guidance
    sample_steps: Calls = 25  # network calls of the samples in grids; a divisor of 1000
    validation_images: Calls = 16  # images of a grid, of all classes in turn
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: VALUES)

    @property
    def side_unit(self) -> int:
        """The number that divides the sides of its images."""
        return 2 ** (len(self.channels) - 1)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, make the untrained pipeline, train it, and write the teacher."""
    try:
        cfg = tyro.cli(PixelTeacher, args=argv, use_underscores=True, description=__doc__, prog=program_name())
        out = Path(cfg.train.output_dir)
        names = validate(cfg)
        start = make_start(cfg, names, out / "start")
    except (ValueError, OSError) as error:
        fail(str(error))
    run.main(make_config(cfg, names, start), [])
    if rank() == 0:
        write_teacher(cfg, names, out / "pipeline", out / "teacher")


def validate(cfg: PixelTeacher) -> tuple[str, ...]:
    """The names of the classes. ValueError for values or images that cannot be used."""
    validate_ranges(cfg, "--")
    if not cfg.images:
        raise ValueError("no images given: pass --images FOLDER, with one subfolder a class")
    if any(width % 8 for width in cfg.channels):
        raise ValueError(f"--channels is {cfg.channels}; each must be a multiple of 8, as 64 128 128")
    if cfg.resolution % cfg.side_unit:
        raise ValueError(
            f"--resolution is {cfg.resolution}; {len(cfg.channels)} levels need a multiple of {cfg.side_unit}"
        )
    if STEPS % cfg.sample_steps:
        raise ValueError(f"--sample_steps is {cfg.sample_steps}; it must divide {STEPS}: 10, 20, 25, 50 or 100, say")
    return read_class_images(cfg.images).names


def make_start(cfg: PixelTeacher, names: tuple[str, ...], folder: Path) -> Path:
    """The folder of the untrained pipeline. It is written once; ValueError if it was written with other values."""
    facts = make_facts(cfg, names)
    if (folder / "model_index.json").is_file():
        before = read_json(folder / "distill.json")
        now = json.loads(json.dumps(facts))
        changed = [key for key, value in now["config"].items() if before.get("config", {}).get(key) != value]
        changed += [key for key in now if key != "config" and before.get(key) != now[key]]
        if changed:
            raise ValueError(
                f"{folder.parent} was begun with other values of {', '.join(changed)} (see {folder / 'distill.json'}): "
                "give the same ones, or choose another --output_dir"
            )
        return folder
    partial = folder.with_name(f".{folder.name}-{rank()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    build_pipeline(cfg, len(names)).save_pretrained(partial)
    (partial / "distill.json").write_text(json.dumps(facts, indent=1))
    try:
        partial.rename(folder)
    except OSError:  # another process of this run was faster; its folder has the same content
        shutil.rmtree(partial)
    return folder


def make_facts(cfg: PixelTeacher, names: tuple[str, ...]) -> dict[str, object]:
    """distill.json of the teacher: the names of its labels, the label for "no label", and the network's values."""
    null = {"null_class": len(names)} if len(names) > 1 else {}
    return {
        "student": False,
        CLASS_NAMES: list(names),
        **null,
        "config": {key: getattr(cfg, key) for key in NETWORK} | {"seed": cfg.train.seed},
    }


def build_pipeline(cfg: PixelTeacher, classes: int) -> ConsistencyModelPipeline:
    """The untrained pipeline: a UNet2DModel under a linear table of betas. One class: a network without labels."""
    import torch
    from diffusers import ConsistencyModelPipeline, DDIMScheduler

    from pipelines.families import ddpm

    scheduler = DDIMScheduler(
        STEPS, **ddpm.TABLE, prediction_type=cfg.prediction, clip_sample=False, timestep_spacing="trailing"
    )
    with torch.random.fork_rng():
        torch.manual_seed(cfg.train.seed)
        labels = classes + 1 if classes > 1 else None
        net = ddpm.unet(cfg.channels, cfg.resolution, 1 if cfg.gray else 3, labels, cfg.layers)
    return ConsistencyModelPipeline(net, scheduler)


def make_config(cfg: PixelTeacher, names: tuple[str, ...], start: Path) -> Config[Denoise, Labels]:
    """The run that trains the pipeline in `start` as a denoiser."""
    return Config(
        method=Denoise(cfg.p_drop if len(names) > 1 else 0.0, Grid(STEPS, 0, STEPS - 1)),
        data=Labels(images=cfg.images),
        teacher=f"{start}",
        student=StudentConfig(steps=cfg.sample_steps, scale=1.0, renoise="ddim"),  # of sample grids
        train=cfg.train,
        validation_images=cfg.validation_images,
        family="ddpm",
    )


def write_teacher(cfg: PixelTeacher, names: tuple[str, ...], pipeline: Path, folder: Path) -> None:
    """Move the exported pipeline to the teacher's folder, with the facts and the page of a teacher."""
    write_atomically(pipeline / "distill.json", json.dumps(make_facts(cfg, names), indent=1))
    write_atomically(pipeline / "README.md", render_page(cfg, names))
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.rename(folder)
    sys.stderr.write(
        f"the export is now {folder}, the teacher; make a one-step student of it by\n"
        f"  distill train --method dmd2 --teacher {folder} --data.images {cfg.images}\n"
    )


def render_page(cfg: PixelTeacher, names: tuple[str, ...]) -> str:
    """The teacher's README: its call and its labels."""
    label = "class_labels=[0], " if len(names) > 1 else ""
    code = f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER")
image = pipe({label}num_inference_steps=50).images[0]"""
    rows = "\n".join(f"| {label} | {escape_markdown(name)} |" for label, name in enumerate(names))
    null = f"Label {len(names)} stands for no label.\n" if len(names) > 1 else ""
    return (
        f"---\nlibrary_name: diffusers\npipeline_tag: unconditional-image-generation\n---\n# A teacher of {len(names)} "
        f"classes, {cfg.resolution} x {cfg.resolution} pixels\n\n{fenced(code, 'python')}\n\n"
        f"| label | class |\n|---|---|\n{rows}\n\n{null}\n"
        f"A UNet2DModel that predicts {cfg.prediction}, trained for {cfg.train.max_train_steps:,} steps of "
        f"{cfg.train.train_batch_size} images; the weights are an average over the steps.\n"
    )


if __name__ == "__main__":
    main()
