"""Teacher score matching on the digits: a network of 77,009 weights for one of 160,401. Values ours.

`accelerate launch recipes/tsm_digits.py --teacher runs/digits/teacher`; then any method starts from it, its student the
same network: `recipes/sid_digits.py --student.network recipes/digits_small --student.init
runs/digits/tsm/checkpoint-2000`. What is exported here is the denoiser called once: a start, no generator.

Choose it to begin a student that is smaller than its teacher and cannot start as its copy. It is a start: a denoiser,
whose single call is blurred until a distillation follows.
"""

from pathlib import Path

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import LogNormal
from distill.methods import TSM
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=TSM(times=LogNormal(-1.0, 1.2)),  # the teacher's training law
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(network=f"{Path(__file__).parent / 'digits_small'}"),
    train=TrainConfig(
        output_dir="runs/digits/tsm",
        max_train_steps=2000,
        train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        adam_beta1=0.9,
        ema_half_life=20_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
