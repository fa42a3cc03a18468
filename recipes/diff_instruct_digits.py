"""Diff-Instruct on the digits: one step, no data. Values ours unless a source is named.

`accelerate launch recipes/diff_instruct_digits.py --teacher runs/digits/teacher`

Choose it as the plain base that VSD, DMD and DMD2 add to, to compare with. Nothing evens out its step over the levels
of noise, and it seeks modes as they do.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Karras, LogNormal
from distill.methods import DiffInstruct
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DiffInstruct(
        fake_steps=4,
        times=Karras(0.02, 20.0),
        fake_times=LogNormal(-1.0, 1.2),  # the teacher's training law
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # SiD
    train=TrainConfig(
        output_dir="runs/digits/diff_instruct",
        max_train_steps=4600,
        train_batch_size=64,
        learning_rate=5e-4,
        fake_learning_rate=1e-3,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        ema_half_life=10_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
