"""TwinFlow on the digits: one step, from scans. Values ours unless a source is named.

`accelerate launch recipes/twinflow_digits.py --teacher runs/digits/teacher`

Choose it where there are images, one model should serve any number of calls and no fake score fits. Its twin is the
same network at negative times: it takes capacity and further passes, and is late as any fake score.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.methods import TwinFlow
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=TwinFlow(rectify=0.5),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=20.0),
    train=TrainConfig(
        output_dir="runs/digits/twinflow",
        max_train_steps=1600,  # a third of sCM's steps and more: six passes a step, three of them backward too
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
