"""SNOOPI on SD 1.5: PG-SB with NASA-T, one step that turns away from negative prompts. Nguyen et al. 2024, 2412.02687.

`accelerate launch recipes/snoopi_sd15.py --data.cache CACHE`, a cache of prompts (python -m pipelines.cache). Values of
the paper, but for its list of 10,000 negative prompts: here they are other prompts. Published: HPSv2 27.46 with NASA at
inference, too, 27.02 without either (pgsb_sd15.py). Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import NASAT, VSD, RewardGuided
from distill.networks.lora import LoRA
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=NASAT(RewardGuided(VSD(guidance=(0.5, 4.0)), weight=0.1, clamp=0.37)),
    data=Text(),
    teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
    family="sd",
    student=StudentConfig(scale=1.0),
    fake=FakeConfig(lora=LoRA(rank=64, alpha=128, targets=("to_q", "to_v"))),
    train=TrainConfig(
        output_dir="runs/snoopi_sd15",
        max_train_steps=60_000,
        train_batch_size=64,
        learning_rate=1e-6,
        fake_learning_rate=1e-3,
        adam_beta1=0.9,
        ema_half_life=440_000,  # SwiftBrush's: a decay of .9999 a step
        ema_ramp=None,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
