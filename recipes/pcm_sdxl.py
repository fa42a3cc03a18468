"""PCM on SDXL with a LoRA: four steps, no new noise. Wang et al. 2024, arXiv 2405.18407; values of the authors' code.

`accelerate launch recipes/pcm_sdxl.py --data.cache CACHE`, a cache of prompts and images (python -m pipelines.cache).
The authors move student and heads in turn, 20,000 times; here each step moves both, on draws of its own. Their heads
have an Adam of their own (first moment 0, weight decay 1e-3), and both of 8 bits: `--optimizer adamw8bit`. The phases
start at the timesteps 999, 749, 499 and 249, where the exported TCDScheduler calls the student. Published: FID 15.55
with four steps (as SANA-Sprint measures it). Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import PCM
from distill.networks.lora import LoRA
from distill.training.config import StudentConfig, TrainConfig
from pipelines.families.sd import FAMILY
from pipelines.run import main

CONFIG = Config(
    method=PCM(
        N=40,
        guidance=(7.0, 8.0),  # w = 6 .. 7, and 1
        taps=("down_blocks.0", "down_blocks.1", "mid_block"),  # ours; the code: nine features
    ),
    data=Text(),
    teacher="stabilityai/stable-diffusion-xl-base-1.0",
    family="sdxl",
    student=StudentConfig(steps=4, scale=1.0, renoise="tcd", lora=LoRA(rank=64, alpha=8, targets=FAMILY.lora_targets)),
    train=TrainConfig(
        output_dir="runs/pcm_sdxl",
        max_train_steps=10_000,
        train_batch_size=80,  # 8 GPUs x 10
        learning_rate=2e-6,
        fake_learning_rate=1e-5,
        adam_beta1=0.9,
        max_grad_norm=1.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
