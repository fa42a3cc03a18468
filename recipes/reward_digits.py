"""SiD with a reward on the digits: one step; how sure a linear classifier is of the label. Values ours unless said.

`accelerate launch recipes/reward_digits.py --teacher runs/digits/teacher`. --method.weight 0 is SiD itself.

Choose it where samples should please something that has a gradient: a classifier, CLIP. Without a clamp, or with a
large weight, the student finds what fools the reward.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Karras, LogNormal
from distill.methods import Rewarded, SiD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=Rewarded(
        SiD(alpha=1.2, times=Karras(0.02, 20.0), fake_times=LogNormal(-1.0, 1.2)),
        reward="labels",
        weight=1.0,
        clamp=-0.05,  # log p of a label beyond which more is of no use; it keeps samples from running away
        until=2000,
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # paper of SiD
    train=TrainConfig(
        output_dir="runs/digits/reward",
        max_train_steps=2000,  # SiD's: a reward costs no call of a network of the teacher's kind
        train_batch_size=64,
        learning_rate=3e-4,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        ema_half_life=10_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
