"""Few-step SiD on SDXL with Zero-CFG: four steps, prompts alone. Zhou et al. 2025, arXiv 2505.12674.

`accelerate launch recipes/sid_sdxl.py --data.cache CACHE`, a cache of prompts (python -m pipelines.cache).
Neither code nor hyper-parameters of this run were published: values ours, after the authors' SANA code, not run at full
size. Published: FID 13.25, CLIP .335 on COCO with a GAN beside it.
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
        kappa=(0.0, 0.0, 0.0, 1.0),  # Zero-CFG: no guidance of the teacher, no text in the fake score
        times=Grid(1000, 20, 979),
        fake_times=Grid(1000, 20, 979),
    ),
    data=Text(),
    teacher="stabilityai/stable-diffusion-xl-base-1.0",
    family="sdxl",
    student=StudentConfig(steps=4, scale=1.0),
    train=TrainConfig(
        output_dir="runs/sid_sdxl",
        max_train_steps=10_000,
        train_batch_size=256,
        learning_rate=1e-6,
        ema_half_life=50_000,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
