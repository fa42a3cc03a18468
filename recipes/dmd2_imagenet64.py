"""DMD2 with its GAN on ImageNet 64x64: one step. Yin et al. 2024, arXiv 2405.14867; values of the authors' scripts.

The teacher is EDM's checkpoint, converted: `python -m pipelines.edm_convert edm-imagenet-64x64-cond-adm.pkl FOLDER`,
then `accelerate launch recipes/dmd2_imagenet64.py --teacher FOLDER --data.images IMAGES` (one folder a class).
Published: FID 1.51 after 200k iterations on 7 A100 (371 GPU hours), 1.28 when started from a run without GAN. Not run
at full size by us.
"""

from distill.configuration import Config
from distill.data.labels import Labels
from distill.methods import DMD2
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DMD2(every=5, gan=3e-3, gan_fake=1e-2),
    data=Labels(),
    student=StudentConfig(),  # sigma 80
    train=TrainConfig(
        output_dir="runs/dmd2_imagenet64",
        max_train_steps=200_000,
        train_batch_size=280,
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
