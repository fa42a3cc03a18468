"""BOOT on the digits: one step, from noise and labels alone. Values ours unless a source is named.

`accelerate launch recipes/boot_digits.py --teacher runs/digits/teacher`

Choose it where there are neither images nor memory for a second trained network. It learns each level of noise from
its own answer at the one before, so early errors are handed on.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.methods import BOOT
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=BOOT(solver="heun", guidance=1.2),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=20.0),
    train=TrainConfig(
        output_dir="runs/digits/boot",
        max_train_steps=2000,  # half of sCM's: the boundary is a second forward and backward
        train_batch_size=64,
        learning_rate=7e-4,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        adam_beta1=0.9,
        ema_half_life=20_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
