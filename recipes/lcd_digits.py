"""Consistency distillation (CD) on the digits: one or two steps from one student. Values ours unless a source is named.

`accelerate launch recipes/lcd_digits.py --teacher runs/digits/teacher`

Choose it where one student should serve one and several calls, and training should be plain. Its samples are noisy
unless the teacher is guided, and a small huber_c is unstable at a large learning rate.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.methods import LCD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=LCD(
        N=18,  # paper, CIFAR-10
        solver="heun",  # paper
        guidance=1.3,  # the samples of a consistency student are noisy: sharpen the teacher
        target_ema=0.9,  # paper, CIFAR-10
        huber_c=0.1,  # a small c is unstable at this learning rate
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(steps=2),  # sigma 80, then 0.625
    train=TrainConfig(
        output_dir="runs/digits/lcd",
        max_train_steps=4000,
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        adam_beta1=0.9,
        ema_half_life=20_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
