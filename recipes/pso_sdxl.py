"""PSO of a four-step SDXL student, online, with a LoRA. Miao et al. 2024, arXiv 2410.03190; values of the code.

The teacher is an exported student with fresh noise between its calls: `python -m pipelines.export --from
dmd2_sdxl_4step_unet_fp16.bin --teacher stabilityai/stable-diffusion-xl-base-1.0 --output_dir runs/dmd2` makes
one of DMD2's file. `accelerate launch recipes/pso_sdxl.py --teacher runs/dmd2 --data.cache CACHE`, a cache of prompts
(python -m pipelines.cache); SDXL's serves. Which sample is better says PickScore, a CLIP. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import PSO
from distill.networks.lora import LoRA
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=PSO(beta=50.0, eps=0.1, reward="yuvalkirstain/PickScore_v1"),
    data=Text(),
    teacher="runs/dmd2",
    family="sdxl",
    student=StudentConfig(
        steps=4,  # of --smoke; else its teacher's: 999, 749, 499, 249, three are tuned (config; script: seven of eight)
        scale=1.0,
        lora=LoRA(rank=16, alpha=16, targets=("to_q", "to_k", "to_v", "to_out.0")),
    ),
    train=TrainConfig(
        output_dir="runs/pso_sdxl",
        max_train_steps=1000,  # ours
        train_batch_size=64,  # ours; the script: 4 a GPU
        learning_rate=1e-5,
        optimizer="adamw",  # of 8 bits in the code: adamw8bit
        adam_beta1=0.9,
        adam_weight_decay=1e-6,
        max_grad_norm=1.0,
        ema_half_life=0,
        gradient_checkpointing=True,  # ours
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
