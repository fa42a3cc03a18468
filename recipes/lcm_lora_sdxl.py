"""LCM-LoRA on SDXL: two to eight steps. Luo et al. 2023, arXiv 2310.04378 and 2311.05556.

`accelerate launch recipes/lcm_lora_sdxl.py --data.cache CACHE`, a cache of prompts and images (python -m
pipelines.cache). Values of diffusers' script and the paper; the released LoRA was trained at a fixed guidance. Not
run at full size by us.
"""

from distill.config import Config
from distill.data import Text
from distill.lora import LoRA
from distill.methods import LCD
from distill.roles import StudentConfig
from distill.trainer import TrainConfig
from pipelines.run import main
from pipelines.sd import TARGETS

CONFIG = Config(
    method=LCD(N=50, guidance=7.5, target_ema=0.0, huber_c=1e-3),
    data=Text(),
    teacher="stabilityai/stable-diffusion-xl-base-1.0",
    family="sdxl",
    student=StudentConfig(steps=4, scale=1.0, lora=LoRA(rank=64, alpha=64, targets=TARGETS)),
    train=TrainConfig(
        output_dir="runs/lcm_lora_sdxl",
        max_train_steps=1000,
        train_batch_size=96,  # 8 GPUs x 12
        learning_rate=1e-4,
        adam_beta1=0.9,
        adam_weight_decay=0.01,
        max_grad_norm=1.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
