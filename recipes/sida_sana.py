"""Few-step SiD on SANA with the Diffusion-GAN loss: four steps, prompts and images. SiD-DiT, arXiv 2509.25127.

`accelerate launch recipes/sida_sana.py --data.cache CACHE`, a cache of prompts and images (python -m pipelines.cache).
Values of the authors' code, which advises the loss only where the images are better than the student's own. The first
student times here are those that the pipeline's own scheduler visits. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import LogitNormal
from distill.methods import SiDA
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SiDA(
        kappa=(4.5, 4.5, 4.5, 4.5),
        p_drop=0.0,
        times=LogitNormal(0.693, 1.6),  # log 2
        fake_times=LogitNormal(0.693, 1.6),
        weight="alpha",  # 1 - sigma
        gan=1.0,
        gan_fake=1.0,
        fusion="sample",
        taps=("norm_out",),
        pairs=False,
        start=79,  # after 20k images
        gan_start=157,  # after 40k images
    ),
    data=Text(),
    teacher="Efficient-Large-Model/Sana_600M_512px_diffusers",
    family="sana",
    student=StudentConfig(steps=4),
    train=TrainConfig(
        output_dir="runs/sida_sana",
        max_train_steps=8_000,  # 1 to 2 M images
        train_batch_size=256,
        learning_rate=5e-6,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
