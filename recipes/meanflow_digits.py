"""MeanFlow on the digits: one step, along the velocity of the teacher. Values ours unless a source is named.

`accelerate launch recipes/meanflow_digits.py --teacher runs/digits/teacher`

Choose it where there are images and one network should do with one call or a few, without an adversary or a fake
score. It differentiates the network in both times: one that is not smooth there makes it unstable, as sCM.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import LogitNormal
from distill.methods import MeanFlow
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=MeanFlow(
        velocity="teacher",
        guidance=1.2,
        times=LogitNormal(0.4, 1.6),
        equal=0.25,
        p=0.5,  # with 1 the levels of little noise, whose error is small, weigh most: one call then makes one image
        warmup=300,
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=20.0, freeze=("time_embedding",)),  # stays smooth in time, see digits_teacher.py
    train=TrainConfig(
        output_dir="runs/digits/meanflow",
        max_train_steps=4000,  # as sCM
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
