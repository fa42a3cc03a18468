"""DMD2 on SDXL with a LoRA student: four steps. Yin et al. 2024, arXiv 2405.14867; values of the authors' scripts.

`accelerate launch recipes/dmd2_sdxl_lora.py --data.cache CACHE`, a cache of prompts and images (python -m
pipelines.cache). On one 24 GB card with images (17.5 GiB by `pipelines.plan`): `--fake.lora.rank 64` and bfloat16.
From prompts alone, with bitsandbytes (values ours): `--method.gan 0 --method.gan_fake 0 --fake.lora.rank 64
--train_batch_size 16 --optimizer adamw8bit`.
Published: FID 19.68 on COCO-10k after 16k iterations on 64 A100 (4,032 GPU hours). Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import DMD2
from distill.networks.lora import LoRA
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from pipelines.families.sd import FAMILY
from pipelines.run import main

CONFIG = Config(
    method=DMD2(guidance=8.0, every=5, gan=5e-3, gan_fake=1e-2),
    data=Text(squeeze=True),  # the authors' latents (generate_vae_latents.py --resize)
    teacher="stabilityai/stable-diffusion-xl-base-1.0",
    family="sdxl",
    student=StudentConfig(steps=4, timestep=399, scale=1.0, lora=LoRA(rank=64, alpha=8, targets=FAMILY.lora_targets)),
    fake=FakeConfig(lora=LoRA(alpha=8, targets=FAMILY.lora_targets)),  # a full copy, unless it is given a rank
    train=TrainConfig(
        output_dir="runs/dmd2_sdxl_lora",
        max_train_steps=16_000,
        train_batch_size=128,
        learning_rate=5e-5,
        lr_warmup_steps=8,
        adam_beta1=0.9,
        adam_weight_decay=0.01,
        max_grad_norm=10.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
