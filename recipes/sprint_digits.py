"""SANA-Sprint's sCM and LADD on the digits: one step. Values ours unless a source is named.

`accelerate launch recipes/sprint_digits.py --teacher runs/digits/teacher`; the digits' network is told no guidance, so
it is a fixed one.

Choose it for one to four steps of one model of a large flow teacher: sCM for the modes, LADD for sharpness. What goes
wrong in sCM and in LADD goes wrong in both.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import LogNormal
from distill.methods import Sprint
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=Sprint(
        guidance=1.2,
        sigma_d=0.75,
        times=LogNormal(-0.8, 1.6),
        warmup=300,
        c=0.1,
        norm="rms",
        reduction="mean",
        gan=0.02,
        gan_times=LogNormal(-1.0, 1.2),
        places=False,
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=20.0, freeze=("time_embedding",)),  # stays smooth in time, see digits_teacher.py
    train=TrainConfig(
        output_dir="runs/digits/sprint",
        max_train_steps=2300,  # 10.3 passes each; sCM takes 4000 of 6.0
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
