"""TCD on SDXL with a LoRA: two to eight steps. Zheng et al. 2024, arXiv 2402.19159.

`accelerate launch recipes/tcd_sdxl.py --data.cache CACHE`, a cache of prompts and images (python -m pipelines.cache).
Length, batch, rank and guidance are as reported of the paper (unverified: its training code was not published); the
rest is as in recipes/lcm_lora_sdxl.py, and so is that the student is not told its guidance. It is exported without new
noise (gamma 0, the default eta of diffusers' pipeline); TCDScheduler takes any. Four steps are at the timesteps 999,
759, 499 and 259 of the training grid. One prediction for all ends is a compromise, see distill/methods/tcd.py.
Published: FID 12.68 on 5k prompts of COCO with four steps. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import TCD
from distill.networks.lora import LoRA
from distill.training.config import StudentConfig, TrainConfig
from pipelines.families.sd import FAMILY
from pipelines.run import main

CONFIG = Config(
    method=TCD(N=50, guidance=(3.0, 15.0), embed=False),  # omega = 2 .. 14, and 1
    data=Text(),
    teacher="stabilityai/stable-diffusion-xl-base-1.0",
    family="sdxl",
    student=StudentConfig(steps=4, scale=1.0, renoise="tcd", lora=LoRA(rank=64, alpha=64, targets=FAMILY.lora_targets)),
    train=TrainConfig(
        output_dir="runs/tcd_sdxl",
        max_train_steps=3000,
        train_batch_size=96,
        learning_rate=1e-4,
        adam_beta1=0.9,
        max_grad_norm=1.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
