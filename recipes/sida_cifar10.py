"""SiDA on CIFAR-10, class-conditional: one step, with real images. Zhou et al. 2024, arXiv 2410.14919.

Values of the authors' code, less dropout (.13) and augmentation. The teacher is EDM's checkpoint, converted: `python -m
pipelines.edm_convert edm-cifar10-32x32-cond-vp.pkl FOLDER`, then `accelerate launch recipes/sida_cifar10.py --teacher
FOLDER --data.images IMAGES` (one folder a class). SiD2A, 100 M images from SiD's student: `--max_train_steps 390625
--student.init runs/sid_cifar10/checkpoint-3125000`. Published: FID 1.396 (SiD2A). Not run at full size by us.
"""

from distill.configuration import Config
from distill.data.labels import Labels
from distill.methods import SiDA
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SiDA(start=391, gan_start=782),  # 100k and 200k images
    data=Labels(),
    student=StudentConfig(sigma=2.5),
    train=TrainConfig(
        output_dir="runs/sida_cifar10",
        max_train_steps=1_171_875,  # 300 M images
        train_batch_size=256,
        learning_rate=1e-5,
        fake_max_grad_value=1.0,
        ema_half_life=500_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
