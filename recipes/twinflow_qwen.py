"""TwinFlow on Qwen-Image: one to four steps from one network. Cheng et al. 2025, arXiv 2512.05150.

`accelerate launch recipes/twinflow_qwen.py --data.cache CACHE`, a cache of prompts and images (python -m
pipelines.cache). Rate, Adam, clipping, weights, kappa, rank and the target's average are those of the authors' LoRA
configuration of second order (commit a109a71), whose rate is ten times that of all weights. Batch and length are ours.
Their adapter is also on the embedding of time and told t - r / 2 in place of both times, and their average moves faster
at first: these are left out. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import TwinFlow
from distill.networks.lora import LoRA
from distill.training.config import StudentConfig, TrainConfig
from pipelines.families.qwen import FAMILY
from pipelines.run import main

CONFIG = Config(
    method=TwinFlow(kappa=0.8, target_ema=0.99, rectify=2 / 3),
    data=Text(),
    teacher="Qwen/Qwen-Image",
    family="qwen",
    student=StudentConfig(steps=2, lora=LoRA(rank=64, alpha=64, targets=FAMILY.lora_targets)),
    train=TrainConfig(
        output_dir="runs/twinflow_qwen",
        max_train_steps=10_000,
        train_batch_size=64,
        learning_rate=1e-4,
        adam_beta1=0.9,
        adam_beta2=0.99,
        max_grad_norm=4 / 3,  # 1 of their loss, which is 3/4 of ours
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
