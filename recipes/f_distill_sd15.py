"""f-distill on SD 1.5: DMD2 under the Jensen-Shannon divergence, one step. Xu et al. 2025, arXiv 2502.15681.

`accelerate launch recipes/f_distill_sd15.py --data.cache CACHE`, a cache of prompts and images (python -m
pipelines.cache). Values of NVIDIA's FastGen (34f30e8, experiments/SD15/config_f_distill.py). Its steps move either the
student, or the fake score and the heads: one of ten the student. Here each step moves the fake score and the heads, and
every ninth the student too, so 90,000 steps are its 100,000. Two things differ: on a step of the student the fake score
learns from the same samples, and the first noise is not scaled by .998. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import Uniform
from distill.methods import FDistill
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=FDistill(
        divergence="js",
        unit_mean=True,
        guidance=1.75,
        every=9,
        gan=1e-3,
        gan_fake=1.0,  # of the heads alone: the teacher's features are frozen
        gan_features="teacher",
        gan_noise="score",
        fake_space="x0",
        times=Uniform(0.001, 0.999),
        fake_times=Uniform(0.001, 0.999),
    ),
    data=Text(),
    teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
    family="sd",
    student=StudentConfig(scale=1.0),
    train=TrainConfig(
        output_dir="runs/f_distill_sd15",
        max_train_steps=90_000,
        train_batch_size=2048,
        learning_rate=1e-5,
        adam_beta1=0.9,
        adam_weight_decay=0.01,
        max_grad_norm=10.0,
        fake_max_grad_norm=0.0,  # the student's alone
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
