"""sCM on the digits: one step. Values ours unless a source is named.

`accelerate launch recipes/scm_digits.py --teacher runs/digits/teacher`

Choose it where there are images and no room for a second trained network: no fake score, no adversary. It
differentiates the network in time: one that is not smooth there, or no warm-up, makes the tangent explode (watch
student/tangent).
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import LogNormal
from distill.methods import SCM
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SCM(sigma_d=0.75, times=LogNormal(-0.8, 1.6), warmup=300, guidance=1.2),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=20.0, freeze=("time_embedding",)),  # stays smooth in time, see digits_teacher.py
    train=TrainConfig(
        output_dir="runs/digits/scm",
        max_train_steps=4000,
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
