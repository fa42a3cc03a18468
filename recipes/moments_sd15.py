"""Moment matching on SD 1.5: eight ancestral steps, prompts and images. Salimans et al. 2024, arXiv 2406.04103.

`accelerate launch recipes/moments_sd15.py --data.cache CACHE` (python -m pipelines.cache, with images). Steps and
optimiser are the paper's. Its teachers are UNets of pixels, which are not published: teacher and guidance are ours.
Published: FID 1.24 on ImageNet 64x64 in eight steps of the paper's teacher. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import MomentMatching
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=MomentMatching(guidance=4.0),  # ours
    data=Text(),
    teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
    family="sd",
    student=StudentConfig(steps=8, renoise="ancestral"),
    train=TrainConfig(
        output_dir="runs/moments_sd15",
        max_train_steps=100_000,  # 200,000 updates, of fake score and student in turn
        train_batch_size=2048,
        learning_rate=1e-4,
        lr_scheduler="linear",  # from the middle on (paper: from the end of the warm-up)
        lr_warmup_steps=1000,
        adam_beta2=0.99,
        adam_epsilon=1e-12,
        max_grad_norm=1.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
