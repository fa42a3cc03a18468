"""SUN on SD 1.5: an adapter for negative prompts in place of guidance, four steps. Chai et al. 2023, 2312.08887.

`accelerate launch recipes/sun_sd15.py --data.cache CACHE`, a cache of prompts and images (python -m pipelines.cache).
Experimental: the paper's are the adapter and four steps; guidance, rates and batch are ours; the losses follow their
description. The export is the base with negative.safetensors, which `install` of pipelines.inference.negative_prompt
adds to any pipeline of SD 1.5. Not run at full size by us. There is no recipe for the digits: no cross-attention reads
their labels.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import SUN
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SUN(guidance=7.5),
    data=Text(),
    teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
    family="sd",
    student=StudentConfig(steps=4, renoise="ddim", negative=77),
    train=TrainConfig(
        output_dir="runs/sun_sd15",
        max_train_steps=20_000,
        train_batch_size=64,
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
