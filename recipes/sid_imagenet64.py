"""SiD on ImageNet 64x64: one step, no data. Zhou et al. 2024, arXiv 2404.04057; values of the authors' code.

The teacher is EDM's checkpoint, converted: `python -m pipelines.edm_convert edm-imagenet-64x64-cond-adm.pkl FOLDER`,
then `accelerate launch recipes/sid_imagenet64.py --teacher FOLDER`. Less the authors' dropout (.1). Published: FID
1.524 after 939 M images. Not run at full size by us.
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
        output_dir="runs/sid_imagenet64",
        max_train_steps=115_000,
        train_batch_size=8192,
        learning_rate=4e-6,
        ema_half_life=2_000_000,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
