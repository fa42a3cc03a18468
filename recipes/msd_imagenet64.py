"""Multi-Student Distillation on ImageNet 64x64: four students in one step. Song et al. 2024, arXiv 2410.23274.

Teacher and images as in recipes/dmd2_imagenet64.py. One run a student, of 250 classes in a row: this is the first, the
others have `--data.classes` 250 .. 499 and so on (`$(seq 250 499)`) and an --output_dir each; `python -m
pipelines.experts` makes one pipeline of the four exports. Classes in a row are as good as k-means of their features
(2.37 and 2.39). The stage without GAN comes first (`--method.gan 0 --method.gan_fake 0`), this one starts from it by
--student.init. Published: FID 1.20 with four students of the teacher's size, 1.28 of one (DMD2); 2.88 with students
smaller by 42 % after teacher score matching, 11.67 without. Rates are DMD2's. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data.labels import Labels
from distill.methods import DMD2
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DMD2(every=5, gan=3e-3, gan_fake=1e-2),
    data=Labels(classes=tuple(range(250))),
    student=StudentConfig(),  # sigma 80
    train=TrainConfig(
        output_dir="runs/msd_imagenet64-0",
        max_train_steps=20_000,  # paper, of its ablations
        train_batch_size=32,  # paper, of each student in its ablations
        learning_rate=2e-6,
        lr_warmup_steps=72,
        adam_beta1=0.9,
        adam_weight_decay=0.01,
        max_grad_norm=10.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
