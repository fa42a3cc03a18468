"""LCM-LoRA on SDXL: two to eight steps. Luo et al. 2023, arXiv 2310.04378 and 2311.05556; values of diffusers' script.

`accelerate launch recipes/lcm_lora_sdxl.py --data.cache CACHE`, a cache of prompts and images (python -m
pipelines.cache). The script draws the guidance of each sample and does not tell it. The released LoRA was trained at a
fixed guidance of 7.5, says its author: `--method.guidance 7.5`. The script's Adam has moments of 8 bits: `--optimizer
adamw8bit`. The student is trained and called on one grid: four steps at timesteps 999, 759, 499 and 259. Not run at
full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import LCD
from distill.networks.lora import LoRA
from distill.training.config import StudentConfig, TrainConfig
from pipelines.families.sd import FAMILY
from pipelines.run import main

CONFIG = Config(
    method=LCD(N=50, guidance=(4.0, 16.0), embed=False, target_ema=0.0, huber_c=1e-3),  # script: w = 3 .. 15, and 1
    data=Text(),
    teacher="stabilityai/stable-diffusion-xl-base-1.0",
    family="sdxl",
    student=StudentConfig(steps=4, scale=1.0, lora=LoRA(rank=64, alpha=64, targets=FAMILY.lora_targets)),
    train=TrainConfig(
        output_dir="runs/lcm_lora_sdxl",
        max_train_steps=1000,
        train_batch_size=96,  # script: 12; eight times that is ours
        learning_rate=1e-4,
        adam_beta1=0.9,
        max_grad_norm=1.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
