"""LADD on SD 3 medium: four steps, a GAN in the features of the teacher. Sauer et al. 2024, arXiv 2403.12015.

Real samples are the teacher's own: `python -m pipelines.pairs --pretrained_model_name_or_path SD3 --prompts
prompts.txt --guidance 5`, then `accelerate launch recipes/ladd_sd3.py --data.cache pairs`. Calls, their shares and
the law of the discriminator's noise are the paper's, whose SD3-Turbo has 8 B parameters and a head after each block;
batch, rates, length and blocks are ours. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import LogitNormal
from distill.methods import LADD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=LADD(
        taps=tuple(f"transformer_blocks.{i}" for i in (0, 4, 8, 12)),  # of 24: what is above the last is not run
        shares=(0.7, 0.1, 0.1, 0.1),
        gan_times=LogitNormal(1.0, 1.0),
    ),
    data=Text(),
    teacher="stabilityai/stable-diffusion-3-medium-diffusers",
    family="sd3",
    student=StudentConfig(steps=4),  # t = 1, .75, .5, .25
    train=TrainConfig(
        output_dir="runs/ladd_sd3",
        max_train_steps=10_000,  # of the student and of the heads each
        train_batch_size=128,
        learning_rate=1e-6,
        fake_learning_rate=1e-4,
        adam_beta1=0.0,
        max_grad_norm=1.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
