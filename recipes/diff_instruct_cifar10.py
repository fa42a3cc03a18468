"""Diff-Instruct on CIFAR-10: one step, no data. Luo et al. 2023, arXiv 2305.18455; values of the authors' command.

The teacher is EDM's checkpoint, converted: `python -m pipelines.edm_convert edm-cifar10-32x32-uncond-vp.pkl FOLDER`,
then `accelerate launch recipes/diff_instruct_cifar10.py --teacher FOLDER`. Published: FID 4.53, unconditional, on one
V100. The authors train both networks with dropout .13, and the fake score with augmentation .12; here there is neither.
Not run at full size by us.
"""

from distill.configuration import Config
from distill.data.labels import Labels
from distill.methods import DiffInstruct
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DiffInstruct(weight="ratio", fake_steps=1),
    data=Labels(),
    student=StudentConfig(sigma=1.0),  # init_sigma; beside the data's .5 not pure noise
    train=TrainConfig(
        output_dir="runs/diff_instruct_cifar10",
        max_train_steps=400_000,  # ours; the command names no length, and its script then stops after 200 M images
        train_batch_size=128,
        learning_rate=1e-5,
        ema_half_life=500_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
