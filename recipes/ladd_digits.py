"""LADD on the digits: one step, a GAN in the teacher's features and nothing else. Values ours unless a source is named.

`accelerate launch recipes/ladd_digits.py --teacher runs/digits/teacher`. The student is slow and the heads fast: at
2e-4 and 4e-4 it came to a single image a label (recall 0).

Choose it where there are images and no room for a fake score. A GAN alone loses modes, down to a single one: watch
recall.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import LogNormal
from distill.methods import LADD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=LADD(
        taps=("down_blocks.0", "mid_block"),
        gan_times=LogNormal(-1.0, 1.2),  # the teacher's training law
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # SiD
    train=TrainConfig(
        output_dir="runs/digits/ladd",
        max_train_steps=4800,
        train_batch_size=64,
        learning_rate=5e-5,
        fake_learning_rate=6e-4,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        ema_half_life=10_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
