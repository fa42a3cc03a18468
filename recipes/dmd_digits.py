"""DMD on the digits: one step, a regression on pairs of the teacher. Values ours unless a source is named.

`accelerate launch recipes/dmd_digits.py --teacher runs/digits/teacher`. The pairs take 35,000 calls of the teacher
before the first step.

Choose it where there are no images and samples of the teacher can be made in advance: they hold the modes. They cost
thousands of calls before the first step, and the student learns their faults, too.
"""

from distill.configuration import Config
from distill.data.labels import LabelPairs
from distill.diffusion.times import Karras, LogNormal
from distill.methods import DMD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DMD(
        guidance=1.0,
        regression=0.25,  # paper
        distance="huber",  # LPIPS knows no 8 x 8 pixels
        huber_c=0.1,
        times=Karras(0.02, 20.0),
        fake_times=LogNormal(-1.0, 1.2),  # the teacher's training law
    ),
    data=LabelPairs(n=1000, steps=18),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # SiD
    train=TrainConfig(
        output_dir="runs/digits/dmd",
        max_train_steps=2150,
        train_batch_size=64,
        learning_rate=5e-4,
        fake_learning_rate=1e-3,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        ema_half_life=10_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
