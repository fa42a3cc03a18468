"""DMD2 on SDXL: four steps, a GAN on real images. Yin et al. 2024, arXiv 2405.14867; values of the authors' scripts.

`accelerate launch recipes/dmd2_sdxl.py --data.cache CACHE`, a cache of prompts and images (python -m pipelines.cache).
`--student.steps 1` is the one-step variant, conditioned at timestep 399; the paper starts it from a regression on pairs
of the teacher: recipes/ode_sdxl.py, then `--student.init runs/ode_sdxl/checkpoint-2000`. Published: FID 19.32 on
COCO-10k in four steps after 19k iterations on 64 A100 (3,648 GPU hours). Not run at full size by us. `--method.share
--method.walk` (ours) take 33.9 forward units a cycle of five iterations instead of 46.4.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import DMD2
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DMD2(guidance=8.0, every=5, gan=5e-3, gan_fake=1e-2),
    data=Text(squeeze=True),  # the authors' latents (generate_vae_latents.py --resize)
    teacher="stabilityai/stable-diffusion-xl-base-1.0",
    family="sdxl",
    student=StudentConfig(
        steps=4,  # 999, 749, 499, 249
        timestep=399,  # of a student of one step
        scale=1.0,  # the first input is the noise itself
    ),
    train=TrainConfig(
        output_dir="runs/dmd2_sdxl",
        max_train_steps=19_000,  # iterations of the fake score; the student moves at every fifth
        train_batch_size=128,  # 64 GPUs x 2
        learning_rate=5e-7,
        lr_warmup_steps=8,  # "500" of a scheduler that advanced by 64 a call
        adam_beta1=0.9,
        adam_weight_decay=0.01,
        max_grad_norm=10.0,
        ema_half_life=0,  # no average in the paper
        gradient_checkpointing=True,  # ours: the authors' code sharded instead
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
