"""TCM on CIFAR-10: one step, after ECT. Lee et al. 2024, arXiv 2410.14895; values of the authors' command.

The first stage is recipes/ect_cifar10.py (theirs: batches of 512): `accelerate launch recipes/tcm_cifar10.py --teacher
FOLDER --data.images IMAGES --student.init runs/ect_cifar10/checkpoint-200000`, with that recipe's FOLDER and IMAGES.
The authors' is unconditional, and has dropout 0.2 with one mask for both calls; here there is none. Two steps:
`--student.steps 2`, sigma 80 and s' = 1 (`--student.times 1 0.4034`). Published: FID 2.46 with one step. Not run at
full size by us.
"""

from distill.configuration import Config
from distill.data.labels import Labels
from distill.methods import TCM
from distill.training.config import TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=TCM(),
    data=Labels(),
    train=TrainConfig(
        output_dir="runs/tcm_cifar10",
        max_train_steps=200_000,  # ours: the code's bound is 3 M
        train_batch_size=1024,
        learning_rate=5e-5,
        optimizer="radam",
        adam_beta1=0.9,
        ema_half_life=7_100_000,  # 0.9999 a step
        ema_ramp=None,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
