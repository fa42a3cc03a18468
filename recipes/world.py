"""The values of methods on the captioned world: one table, which `recipes.train` reads with --teacher world.

The teacher is that of world_teacher.py, the student a copy of it. `python -m eval.world data runs/world/data` writes
the prompts and images. `accelerate launch -m recipes.train --method NAME --teacher world` runs a row. Values are ours.
"""

from __future__ import annotations

from distill import methods
from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import Karras, LogNormal
from distill.method import Method, Requirement
from distill.training.config import StudentConfig, TrainConfig
from recipes.digits import TABLE as DIGITS
from recipes.table import Row

FOLDER = "runs/world"
TEACHER = f"{FOLDER}/teacher"
PROMPTS = f"{FOLDER}/data/prompts.txt"
IMAGES = f"{FOLDER}/data/images"
STUDENT = StudentConfig(scale=1.0)
TABLE: dict[str, Row] = {}


def add(name: str, title: str, method: Method, note: str = "", **train: object) -> None:
    """Add a row to the table. train: the fields of TrainConfig that differ from those that most rows share."""
    shared = {
        "output_dir": f"{FOLDER}/{name}",
        "train_batch_size": 64,
        "learning_rate": 3e-4,
        "fake_learning_rate": 5e-4,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 10,
        "ema_half_life": 1000,
    }
    images = IMAGES if Requirement.REAL in method.requirements else ""
    config = Config(
        method=method,
        data=Text("online", prompts=PROMPTS, images=images),
        validation_images=40,
        teacher=TEACHER,
        student=STUDENT,
        train=TrainConfig(**shared | train),
        family="sd",
    )
    TABLE[name] = Row(title, DIGITS[name].advice, note, config)


add(
    "sid",
    "SiD: one step, prompts alone.",
    methods.SiD(alpha=1.0, kappa=(1.0, 1.0, 1.0, 1.0), times=Karras(0.02, 12.0), fake_times=LogNormal(0.0, 1.4)),
    max_train_steps=160,
)
add(
    "dmd2",
    "DMD2 with its GAN: one step.",
    methods.DMD2(guidance=1.25, every=2, gan=0.1, gan_fake=0.03, share=True),
    max_train_steps=240,
    max_grad_norm=10.0,
)
add(
    "vsd",
    "VSD: one step, prompts alone.",
    methods.VSD(guidance=2.0),
    max_train_steps=300,
    max_grad_norm=10.0,
)
add(
    "lcd",
    "LCD: latent consistency distillation, one step.",
    methods.LCD(N=18, guidance=2.0, solver="ddim", target_ema=0.9, huber_c=0.1),
    learning_rate=1e-3,
    adam_beta1=0.9,
    max_train_steps=400,
    max_grad_norm=10.0,
)
