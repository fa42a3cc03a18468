"""Phased DMD on the digits: two steps, an expert each. Values ours unless a source is named.

`accelerate launch recipes/phased_digits.py --teacher runs/digits/teacher` trains the first expert. The second, and with
both the pipeline: `--output_dir runs/digits/phased --student.experts runs/digits/phased-1/checkpoint-1200` beside it.

Choose it for several calls, each with an expert of its own, of a teacher too large to hold several times. The phases
are trained one after the other, what an earlier one lacks stays, and the student cannot do with fewer calls.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Uniform
from distill.methods import PhasedDMD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=PhasedDMD(guidance=1.0, every=2, times=Uniform(0.02, 0.98), fake_times=Uniform(0.02, 1.0)),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(steps=2, phases=2),  # calls at sigma 80 and .625
    train=TrainConfig(
        output_dir="runs/digits/phased-1",
        max_train_steps=1200,  # of each expert: half of one student's
        train_batch_size=64,
        learning_rate=4e-4,
        fake_learning_rate=6e-4,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        ema_half_life=10_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
