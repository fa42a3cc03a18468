"""iCT on CIFAR-10: one step, from images alone. Song & Dhariwal 2023, arXiv 2310.14189; the paper's values.

The paper's network starts from nothing; here a student starts from its teacher, which is not called: EDM's checkpoint,
converted (`python -m pipelines.edm_convert edm-cifar10-32x32-cond-vp.pkl FOLDER`), then `accelerate launch
recipes/ict_cifar10.py --teacher FOLDER --data.images IMAGES` (one folder a class). The paper's is unconditional, and
has dropout 0.3 with one mask for both calls; here there is none. There is no code of the authors', and these values are
not verified. Published: FID 2.83 with one step, 2.46 with two. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data.labels import Labels
from distill.diffusion.curriculum import ICTCurriculum
from distill.methods import CT
from distill.training.config import TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=CT(ICTCurriculum(), c=0.03),
    data=Labels(),
    train=TrainConfig(
        output_dir="runs/ict_cifar10",
        max_train_steps=400_000,
        train_batch_size=1024,
        learning_rate=1e-4,
        optimizer="radam",
        adam_beta1=0.9,
        ema_half_life=10_100_000,  # 0.99993 a step
        ema_ramp=None,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
