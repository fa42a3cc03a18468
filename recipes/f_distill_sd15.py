"""f-distill on SD 1.5: DMD2 under the Jensen-Shannon divergence, one step. Xu et al. 2025, arXiv 2502.15681.

`accelerate launch recipes/f_distill_sd15.py --data.cache CACHE`, a cache of prompts and images (python -m
pipelines.cache). Values of NVIDIA's FastGen. Its discriminator reads the teacher, and its h is divided by its mean
over the batch; here it reads the fake score, as DMD2's, and h is 1 where the student is the teacher. Not run at full
size by us.
"""

from distill.config import Config
from distill.data import Text
from distill.methods import FDistill
from distill.roles import StudentConfig
from distill.trainer import TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=FDistill(
        divergence="js",
        guidance=1.75,
        every=10,
        gan=1e-3,
        gan_fake=1e-2,  # DMD2
    ),
    data=Text(),
    teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
    family="sd",
    student=StudentConfig(scale=1.0),
    train=TrainConfig(
        output_dir="runs/f_distill_sd15",
        max_train_steps=100_000,
        train_batch_size=2048,
        learning_rate=1e-5,
        adam_beta1=0.9,
        adam_weight_decay=0.01,
        max_grad_norm=10.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
