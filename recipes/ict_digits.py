"""iCT's curriculum on the digits: one step, from the scans alone. Values ours unless a source is named.

`accelerate launch recipes/ict_digits.py --teacher runs/digits/teacher`. iCT starts from nothing; here the student
starts from the teacher, as every student does, which is not called. Choose it where there is no teacher to trust, for
long runs; with few images the noise of its targets is large, and c must grow with the sample.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.curriculum import Doubling
from distill.methods import CT
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=CT(
        Doubling(n_0=10, n_1=160, steps=6000, low=0.02, high=20.0, mean=-0.8, std=1.6),  # five stages
        c=0.0043,  # paper: 0.00054 times the root of 64 pixels
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=20.0),
    train=TrainConfig(
        output_dir="runs/digits/ict",
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
