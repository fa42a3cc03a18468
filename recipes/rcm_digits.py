"""rCM on the digits: one step. Values ours unless a source is named.

`accelerate launch recipes/rcm_digits.py --teacher runs/digits/teacher`. Choose it where sCM alone is blurred and a
third network fits into memory; with too large a lambda it loses modes as DMD does.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Karras, LogNormal
from distill.methods import RCM
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=RCM(
        guidance=1.2,
        sigma_d=0.75,
        times=LogNormal(-0.8, 1.6),
        warmup=300,
        norm="rms",
        reduction="mean",
        dmd=0.005,  # of means
        dmd_times=Karras(0.02, 20.0),
        every=2,
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=20.0, freeze=("time_embedding",)),  # stays smooth in time, see digits_teacher.py
    train=TrainConfig(
        output_dir="runs/digits/rcm",
        max_train_steps=3000,
        train_batch_size=64,
        learning_rate=7e-4,
        fake_learning_rate=1e-3,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        adam_beta1=0.9,
        ema_half_life=20_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
