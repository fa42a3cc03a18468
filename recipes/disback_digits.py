"""DisBack on the digits: DMD2 along the degradation of the teacher, backwards; one step. Values ours.

`accelerate launch recipes/disback_digits.py --teacher runs/digits/teacher --method.record runs/digits/degradation`,
which recipes/degradation_digits.py has made; without --method.record it is DMD2. The iterations of both are DMD2's.

Choose it where the student starts far from the teacher's samples. The record costs a run of its own: without one it is
off, and is DMD2.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Karras, LogNormal
from distill.methods import DisBack
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DisBack(
        guidance=1.0,
        every=2,
        gan=0.1,
        gan_fake=0.03,
        times=Karras(0.02, 20.0),
        fake_times=LogNormal(-1.0, 1.2),  # the teacher's training law
        gan_times=LogNormal(-1.0, 1.2),
        interval=100,
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # SiD's init_sigma
    train=TrainConfig(
        output_dir="runs/digits/disback",
        max_train_steps=2000,
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
