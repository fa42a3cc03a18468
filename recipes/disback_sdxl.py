"""DisBack on SDXL: one step, from a student of DMD2. Zhang et al. 2024, arXiv 2408.15991; the authors' values.

`accelerate launch recipes/disback_sdxl.py --data.cache CACHE --method.record RECORD --student.init STUDENT`. STUDENT is
a checkpoint of `recipes/dmd2_sdxl.py --student.steps 1`, from which the authors start too. RECORD is a run of
`recipes.train --method degradation --student.init STUDENT --learning_rate 5e-7 --train_batch_size 1 --max_train_steps
1000 --checkpointing_steps 100 --checkpoints_total_limit None`. Without --method.record it is DMD2. Published in one
step, on ImageNet 64x64: FID 1.38. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import DisBack
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DisBack(guidance=8.0, every=5, gan=5e-3, gan_fake=1e-2, interval=1000),
    data=Text(),
    teacher="stabilityai/stable-diffusion-xl-base-1.0",
    family="sdxl",
    student=StudentConfig(timestep=399, scale=1.0),
    train=TrainConfig(
        output_dir="runs/disback_sdxl",
        max_train_steps=15_000,  # ours: nine recorded teachers, then the last
        train_batch_size=128,  # of recipes/dmd2_sdxl.py; the script's own is 1 a GPU
        learning_rate=5e-7,
        lr_warmup_steps=8,
        adam_beta1=0.9,
        adam_weight_decay=0.01,
        max_grad_norm=10.0,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
