"""DMD2 on Wan 2.1 text-to-video: four steps, prompts alone; values of LightX2V's code where it states them.

`accelerate launch recipes/dmd2_wan.py --data.cache CACHE`, a cache of prompts (python -m pipelines.cache).
From that code: rates, Adam, guidance, range of times; batch and length are ours. Not run at full size by us.
"""

from distill.config import Config
from distill.data import Text
from distill.methods import DMD2
from distill.roles import StudentConfig
from distill.times import Shifted, Uniform
from distill.trainer import TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DMD2(
        guidance=4.0,
        gan=0.0,
        gan_fake=0.0,
        times=Shifted(Uniform(0.02, 0.98), 7.0),
        fake_times=Shifted(Uniform(0.0, 0.999), 7.0),
    ),
    data=Text(),
    teacher="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    family="wan",
    student=StudentConfig(steps=4),
    train=TrainConfig(
        output_dir="runs/dmd2_wan",
        max_train_steps=6000,
        train_batch_size=64,
        learning_rate=2e-6,
        fake_learning_rate=4e-7,
        max_grad_norm=1.0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
