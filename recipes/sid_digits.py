"""SiD on the digits: one step, no data. Values ours unless a source is named.

`accelerate launch recipes/sid_digits.py --teacher runs/digits/teacher`

Choose it where there are no images and the student should come as near to its teacher as data-free ones do. Its
student's loss goes back through both scores: an iteration costs twice VSD's. With alpha above 1, a student that is
far too wide gets wider: start from the teacher.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Karras, LogNormal
from distill.methods import SiD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SiD(alpha=1.2, times=Karras(0.02, 20.0), fake_times=LogNormal(-1.0, 1.2)),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # paper
    train=TrainConfig(
        output_dir="runs/digits/sid",
        max_train_steps=2000,
        train_batch_size=64,
        learning_rate=3e-4,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        ema_half_life=10_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
