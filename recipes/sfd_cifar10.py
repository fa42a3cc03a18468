"""SFD on CIFAR-10: SiD, whose student of a forgotten class makes another one. Chen et al. 2024, arXiv 2409.11219.

`accelerate launch recipes/sfd_cifar10.py --teacher TEACHER`, TEACHER a teacher of labels (python -m
pipelines.edm_convert). Another class is forgotten with `--method.forget 3 --method.override 5 --method.keep 0 1 2 4 5 6
7 8 9`. The authors' values for a DDPM, their times as levels, on EDM's network, whose law the fake score keeps; their
networks have dropout .1, here there is none. A second stage starts from SiD's student and fake score: --student.init
and --fake.init runs/sid_cifar10/checkpoint-N, with --fake_learning_rate 3e-5. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data.labels import Labels
from distill.diffusion.times import Karras
from distill.methods import SFD, SiD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SFD(
        SiD(alpha=1.2, times=Karras(0.137, 13.01)),  # t = 38 .. 711
        forget=(0,),
        override=(1,),
        keep=tuple(range(1, 10)),
        weight=0.01,
        fake_weight=0.01,
    ),
    data=Labels(),
    student=StudentConfig(sigma=2.5),  # SiD
    train=TrainConfig(
        output_dir="runs/sfd_cifar10",
        max_train_steps=50_000,
        train_batch_size=128,
        learning_rate=1e-5,
        max_grad_value=1.0,
        fake_max_grad_value=1.0,
        ema_half_life=887_000,  # a decay of .9999 a step
        ema_ramp=None,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
