"""sCM on the digits: one step. Values ours unless a source is named.

`accelerate launch recipes/scm_digits.py --teacher runs/digits/teacher`
"""

from distill.config import Config
from distill.methods import SCM
from distill.roles import StudentConfig
from distill.times import LogNormal
from distill.trainer import TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SCM(sigma_d=0.75, times=LogNormal(-0.5, 1.4), warmup=500),
    teacher="runs/digits/teacher",
    student=StudentConfig(freeze=("time_embedding",)),  # stays smooth in time, see digits_teacher.py
    train=TrainConfig(
        output_dir="runs/digits/scm",
        max_train_steps=3000,
        train_batch_size=64,
        learning_rate=5e-4,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        ema_half_life=6000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
