"""NCT on the digits: a control adapter on a finished one-step student, which keeps to a coarse picture. Values ours.

`accelerate launch recipes/digits_nct.py --teacher runs/digits/dmd2/pipeline`, any exported one-step student of the
digits; then `python -m pipelines.control runs/digits/nct/pipeline` measures how well it keeps to pictures: on a student
of dmd2_digits.py, mean |c(x) - y| is .055 with the adapter and .117 without (pixels in [0, 1]).
With --method.dual 0 --method.rate 0, nothing holds the samples at the base's, and it is .286 after 300 steps.

Choose it where a finished student should follow a picture that can be made of every sample. With a bound too large, or
a small lambda, samples lose their diversity; with a small one the control is learned slowly.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.methods import NCT
from distill.training.config import TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=NCT(control="downsample", factor=2, levels=5, bound=3e-3),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/dmd2/pipeline",
    train=TrainConfig(
        output_dir="runs/digits/nct",
        max_train_steps=600,
        train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        adam_beta1=0.9,
        ema_half_life=10_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
