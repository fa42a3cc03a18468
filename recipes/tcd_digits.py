"""TCD on the digits: one or two steps from one student. Values ours unless a source is named.

`accelerate launch recipes/tcd_digits.py --teacher runs/digits/teacher`; as CD's recipe, but for the ends. The pipeline
of the digits renoises with fresh noise, TCD's gamma = 1.

Choose it where the number of steps is settled after training. It is for two and more: one prediction serves all ends
of a jump, and a single call from pure noise loses modes.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.methods import TCD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=TCD(N=18, solver="heun", guidance=1.15, target_ema=0.9, huber_c=0.1),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(steps=2),  # sigma 80, then 0.625
    train=TrainConfig(
        output_dir="runs/digits/tcd",
        max_train_steps=4000,
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        adam_beta1=0.9,
        ema_half_life=20_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
