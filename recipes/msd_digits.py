"""Multi-Student Distillation of the digits: DMD2, two students of five labels each. Song et al. 2024, arXiv 2410.23274.

`accelerate launch recipes/msd_digits.py --teacher runs/digits/teacher` trains that of 0 to 4, with
`--data.classes 5 6 7 8 9 --output_dir runs/digits/msd-1` the other; one pipeline of both: `python -m pipelines.experts
runs/digits/msd-0/pipeline runs/digits/msd-1/pipeline --output_dir runs/digits/msd/pipeline`. Values those of
recipes/dmd2_digits.py.

Choose it where one student is too small for all conditions: each learns a part of them. All students have to be kept,
and each sees a part of the data only.
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
    data=Digits(classes=(0, 1, 2, 3, 4)),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # SiD's init_sigma
    train=TrainConfig(
        output_dir="runs/digits/msd-0",
        max_train_steps=1200,  # of each student: half of one for all
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
