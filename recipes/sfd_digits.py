"""SFD on the digits: SiD, whose student of the label 3 makes eights. Values ours unless a source is named.

`accelerate launch recipes/sfd_digits.py --teacher runs/digits/teacher`

Choose it where a student must not make what its teacher can. A class is one other class in its place: sent to several
at random it becomes a mixture between them. Here each eight that is asked for as a three counts as an error: of the
accuracy, and by its share in the distances.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Karras, LogNormal
from distill.methods import Forgetting, SiD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=Forgetting(
        SiD(alpha=1.2, times=Karras(0.02, 20.0), fake_times=LogNormal(-1.0, 1.2)),
        forget=(3,),
        override=(8,),
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # paper of SiD
    train=TrainConfig(
        output_dir="runs/digits/sfd",
        max_train_steps=1000,  # half of SiD's: each step has two batches
        train_batch_size=64,
        learning_rate=3e-4,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        ema_half_life=10_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
