"""f-distill on the digits: DMD2 under the Jensen-Shannon divergence, one step. Values ours unless a source is named.

`accelerate launch recipes/f_distill_digits.py --teacher runs/digits/teacher`; other divergences: `--method.divergence
forward-kl`. All but the divergence is recipes/dmd2_digits.py.

Choose it where DMD2 loses modes: a divergence other than reverse-kl weighs samples that the student makes too seldom.
It hangs on the discriminator: a ratio at its bounds says nothing (watch student/h_low and h_high).
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Karras, LogNormal
from distill.methods import FDistill
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=FDistill(
        divergence="js",  # paper: the best on ImageNet-64 and COCO
        guidance=1.0,
        every=2,
        gan=0.1,  # 30 times the paper's: the feature map is small, and recall needs it
        gan_fake=0.03,
        ratio_bins=0,  # ours: 64 samples, and almost all levels of noise are in the lowest bin of sigma
        times=Karras(0.02, 20.0),
        fake_times=LogNormal(-1.0, 1.2),  # the teacher's training law
        gan_times=LogNormal(-1.0, 1.2),
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # SiD
    train=TrainConfig(
        output_dir="runs/digits/f_distill",
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
