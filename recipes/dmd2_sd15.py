"""DMD2 on SD 1.5: one step. Yin et al. 2024, arXiv 2405.14867; values of the authors' scripts.

Stage 1, from prompts alone: `accelerate launch recipes/dmd2_sd15.py --data.cache CACHE` (python -m pipelines.cache).
Stage 2, with the GAN and a cache of prompts and images: the same with `--method.gan 1e-3 --method.gan_fake 1e-2
--learning_rate 5e-7 --max_train_steps 2000 --student.init runs/dmd2_sd15/checkpoint-39000 --fake.init
runs/dmd2_sd15/checkpoint-39000 --output_dir runs/dmd2_sd15_gan`. Published: FID 9.28 on COCO-30k after stage 1 (1,600
A100 hours), 8.35 after stage 2 (128). Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import DMD2
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DMD2(guidance=1.75, every=10, gan=0.0, gan_fake=0.0),
    data=Text(squeeze=True),  # the authors' latents (generate_vae_latents.py --resize)
    teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
    family="sd",
    student=StudentConfig(scale=1.0),
    train=TrainConfig(
        output_dir="runs/dmd2_sd15",
        max_train_steps=39_000,
        train_batch_size=2048,  # 64 GPUs x 32
        learning_rate=1e-5,
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
