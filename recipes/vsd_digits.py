"""VSD on the digits: one step, no data. Values ours unless a source is named.

`accelerate launch recipes/vsd_digits.py --teacher runs/digits/teacher`. PG-SB: `--method.guidance 0.5 4`. SwiftBrush's
LoRA fake score: `--fake.lora.rank 16 --fake.lora.alpha 32 --fake.lora.targets conv1 conv2 time_emb_proj`.

Choose it for data-free training with the least memory: the fake score may be an adapter on the teacher. It seeks
modes, so recall is the first to fall; more fake steps a student step, or random guidance (PG-SB), help.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import Karras, LogNormal
from distill.methods import VSD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=VSD(
        guidance=1.0,
        fake_steps=4,
        times=Karras(0.02, 20.0),
        fake_times=LogNormal(-1.0, 1.2),  # the teacher's training law
        weight=False,  # on EDM's levels sigma^2 / (1 + sigma^2) all but ignores the low noise, where strokes are made
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # SiD
    train=TrainConfig(
        output_dir="runs/digits/vsd",
        max_train_steps=4800,
        train_batch_size=64,
        learning_rate=5e-4,
        fake_learning_rate=1e-3,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        ema_half_life=10_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
