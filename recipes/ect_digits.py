"""ECT on the digits: one step, from the teacher's weights and the scans alone. Values ours unless a source is named.

`accelerate launch recipes/ect_digits.py --teacher runs/digits/teacher`; the teacher is where the student starts, and is
not called. Choose it where images abound and the teacher is costly to call; the levels must draw close in stages, so a
short run stays blurred, and the value of the loss says little.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.curriculum import Closing
from distill.diffusion.times import LogNormal
from distill.methods import CT
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=CT(Closing(LogNormal(-0.8, 1.6), every=750)),  # eight stages
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=20.0),
    train=TrainConfig(
        output_dir="runs/digits/ect",
        max_train_steps=6000,  # CD's 4000 make as many network calls
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
