"""SiD with long and short guidance (LSG) on SD 1.5: one step, prompts alone. Zhou et al. 2024, arXiv 2406.01561.

`accelerate launch recipes/sid_sd15.py --data.cache CACHE`, a cache of prompts (python -m pipelines.cache). Values of
the authors' scripts. Published: FID 8.71 and CLIP .302 on COCO-30k at kappa 1.5 after 8.8 M images. Not run at full
size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import Grid
from distill.methods import SiD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SiD(
        alpha=1.0,
        kappa=(1.5, 1.5, 1.5, 1.5),  # 1.5 for FID, up to 4.5 for CLIP
        times=Grid(1000, 20, 979),
        fake_times=Grid(1000, 20, 979),
        gain=1.0,
    ),
    data=Text(),
    teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
    family="sd",
    student=StudentConfig(timestep=625),
    train=TrainConfig(
        output_dir="runs/sid_sd15",
        max_train_steps=17_200,
        train_batch_size=512,
        learning_rate=1e-6,
        ema_half_life=50_000,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
