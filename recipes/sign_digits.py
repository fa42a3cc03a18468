"""SIGN (experimental) on the digits: an idempotent one-step student. Values ours unless a source is named.

`accelerate launch recipes/sign_digits.py --teacher runs/digits/teacher`

Choose it to study it: its equation is a reconstruction. Otherwise take DMD2 or VSD, which it adds to.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Karras, LogNormal
from distill.methods import SIGN
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SIGN(
        idem=0.1,
        rec=0.1,
        flow=0.1,
        denoise=0.1,
        times=Karras(0.02, 20.0),
        fake_times=LogNormal(-1.0, 1.2),  # the teacher's training law
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),
    train=TrainConfig(
        output_dir="runs/digits/sign",
        max_train_steps=1200,
        train_batch_size=64,
        learning_rate=4e-4,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        ema_half_life=10_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
