"""SiD on CIFAR-10, class-conditional: one step, no data. Zhou et al. 2024, arXiv 2404.04057.

Values of the authors' code, less dropout (.13) and augmentation. The teacher is EDM's checkpoint, converted: `python -m
pipelines.edm_convert edm-cifar10-32x32-cond-vp.pkl FOLDER`, then `accelerate launch recipes/sid_cifar10.py --teacher
FOLDER`. Published: FID 1.710 after 800 M images. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data.labels import Labels
from distill.methods import SiD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SiD(alpha=1.2),
    data=Labels(),
    student=StudentConfig(sigma=2.5),
    train=TrainConfig(
        output_dir="runs/sid_cifar10",
        max_train_steps=3_125_000,
        train_batch_size=256,
        learning_rate=1e-5,
        ema_half_life=500_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
