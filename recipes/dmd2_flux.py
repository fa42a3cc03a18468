"""DMD2 on FLUX.1-dev: four steps, LoRA student and fake score on one backbone, prompts alone.

`accelerate launch recipes/dmd2_flux.py --data.cache CACHE`, a cache of prompts (python -m pipelines.cache). No recipe
was published for this teacher: values ours, not run at full size. The teacher is guided by its embedding (3.5).
"""

from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import ShiftedTimes, Uniform
from distill.methods import DMD2
from distill.networks.lora import LoRA
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DMD2(
        guidance=1.0,
        gan=0.0,
        gan_fake=0.0,
        times=ShiftedTimes(Uniform(0.02, 0.98), 3.0),
        fake_times=ShiftedTimes(Uniform(0.0, 0.999), 3.0),
    ),
    data=Text(),
    teacher="black-forest-labs/FLUX.1-dev",
    family="flux",
    student=StudentConfig(steps=4, lora=LoRA(rank=64, alpha=64, targets=("to_q", "to_k", "to_v", "to_out.0"))),
    fake=FakeConfig(lora=LoRA(rank=64, alpha=64, targets=("to_q", "to_k", "to_v", "to_out.0"))),
    train=TrainConfig(
        output_dir="runs/dmd2_flux",
        max_train_steps=10_000,
        train_batch_size=64,
        learning_rate=2e-5,
        max_grad_norm=1.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
