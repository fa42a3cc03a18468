"""DMD2 with its GAN on the digits: one step. Values ours unless a source is named.

`accelerate launch recipes/dmd2_digits.py --teacher runs/digits/teacher`

Choose it where there are images and a few steps are wanted, too. Without the GAN, or with a weak one, it loses modes
(recall falls first); with too few fake steps the fake score lags and the samples drift (watch student/lag).
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Karras, LogNormal
from distill.methods import DMD2
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DMD2(
        guidance=1.0,
        every=2,
        gan=0.1,  # 30 times the paper's: the feature map is small, and recall needs it
        gan_fake=0.03,
        times=Karras(0.02, 20.0),
        fake_times=LogNormal(-1.0, 1.2),  # the teacher's training law
        gan_times=LogNormal(-1.0, 1.2),
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # SiD's init_sigma
    train=TrainConfig(
        output_dir="runs/digits/dmd2",
        max_train_steps=2400,
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
