"""SiDA on the digits: one step, with a GAN on real scans and their labels. Values ours unless a source is named.

`accelerate launch recipes/sida_digits.py --teacher runs/digits/teacher`

Choose it where SiD has real images and labels beside it: a GAN for the price of one more encoder pass. Its weights
have to be found again for other data, by factors of ten.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Karras, LogNormal
from distill.methods import SiDA
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SiDA(
        alpha=1.2,  # as SiD's
        gan=10.0,  # of (0.1, 0.1), (1, 1) and (10, 10) for both weights the least distance to the training split
        gan_fake=10.0,
        times=Karras(0.02, 20.0),
        fake_times=LogNormal(-1.0, 1.2),  # the teacher's training law
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # paper
    train=TrainConfig(
        output_dir="runs/digits/sida",
        max_train_steps=1800,  # SiD's 2000, less what the encoder's pass on the scans costs
        train_batch_size=64,
        learning_rate=3e-4,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        ema_half_life=10_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
