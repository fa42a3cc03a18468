"""sLCT's terms on the digits: one step, from the scans alone. Values ours unless a source is named.

`accelerate launch recipes/slct_digits.py --teacher runs/digits/teacher`; the student starts from the teacher, which is
not called.

Choose it for latents with outliers and without a teacher; its noise is coupled over the images of a micro-batch that
have one condition, which must be many for that to matter: it is for one or few classes.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.curriculum import Doubling
from distill.methods import SLCT
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SLCT(Doubling(n_0=10, n_1=160, steps=6000, low=0.02, high=20.0, mean=-0.8, std=1.6), c=8.0),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=20.0),
    train=TrainConfig(
        output_dir="runs/digits/slct",
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
