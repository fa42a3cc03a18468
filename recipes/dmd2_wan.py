"""DMD2 on Wan 2.1 text-to-video: four steps, prompts alone; values of LightX2V's configuration for 1.3 B parameters.

`accelerate launch recipes/dmd2_wan.py --data.cache CACHE`, a cache of prompts (python -m pipelines.cache). LightX2V
also moves the fake score towards the student after each of the student's steps, and regresses its first call on the
teacher's way: here neither is done. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import Clip, ShiftedTimes, Uniform
from distill.methods import DMD2
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DMD2(
        guidance=3.0,
        every=5,
        gan=0.0,
        gan_fake=0.0,
        times=Clip(ShiftedTimes(Uniform(0.0, 1.0), 5.0), 0.02, 0.98),
        fake_times=Clip(ShiftedTimes(Uniform(0.0, 1.0), 5.0), 0.02, 0.98),
    ),
    data=Text(),
    teacher="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    family="wan",
    student=StudentConfig(steps=4, times=(1.0, 0.9375, 5 / 6, 0.625)),  # 1, .75, .5, .25 shifted by 5
    train=TrainConfig(
        output_dir="runs/dmd2_wan",
        max_train_steps=5000,  # LightX2V: 1,000 times one step of the student and five of the fake score
        train_batch_size=64,  # ours; LightX2V: 2 a GPU
        learning_rate=2e-6,
        fake_learning_rate=4e-7,
        adam_weight_decay=0.01,
        max_grad_norm=10.0,
        ema_half_life=0,  # LightX2V has no average
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
