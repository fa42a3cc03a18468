"""Regression of one-step SDXL onto its teacher's ODE, before DMD2. Yin et al. 2024, arXiv 2405.14867.

`python -m pipelines.pairs --pretrained_model_name_or_path SDXL --prompts prompts.txt --scheduler euler` samples 10,000
pairs in 50 steps at guidance 8; `accelerate launch recipes/ode_sdxl.py --data.cache pairs` trains on them, and
`recipes/dmd2_sdxl.py --student.steps 1 --student.init runs/ode_sdxl/checkpoint-2000` goes on. Values of the authors'
script. LPIPS needs `pip install 'distill-one-step[lpips]'`. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data.pairs import Pairs
from distill.methods import Regression
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=Regression(distance="lpips", decoder="madebyollin/taesdxl"),
    data=Pairs(),
    teacher="stabilityai/stable-diffusion-xl-base-1.0",
    family="sdxl",
    student=StudentConfig(
        timestep=399,  # of the one call
        scale=1.0,  # its input is the noise itself
    ),
    train=TrainConfig(
        output_dir="runs/ode_sdxl",
        max_train_steps=2000,
        train_batch_size=256,  # 64 GPUs x 4
        learning_rate=1e-5,
        lr_warmup_steps=8,  # "500" of a scheduler that advanced by 64 a call
        adam_beta1=0.9,
        adam_weight_decay=0.01,
        max_grad_norm=None,  # the authors' script does not clip
        ema_half_life=0,  # no average in the paper
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
