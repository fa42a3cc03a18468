"""DMD on SD 1.5: one step, with a regression on the teacher's pairs. Yin et al. 2023, arXiv 2311.18828.

`python -m pipelines.pairs --pretrained_model_name_or_path SD15 --prompts prompts.txt --guidance 3 --n 1000000` samples
the pairs, and goes on where it was interrupted; then `accelerate launch recipes/dmd_sd15.py --data.cache pairs`.
Published: FID 11.49 on COCO-30k at guidance 3. There is no code of the authors': lambda, d and the range of times are
the paper's (unverified); batch, rates and length are those of DMD2's scripts for this teacher. LPIPS needs `pip install
'distill-one-step[lpips]'`. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data.pairs import Pairs
from distill.methods import DMD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=DMD(guidance=3.0, regression=0.25, distance="lpips"),
    data=Pairs(guidance=3.0),
    teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
    family="sd",
    student=StudentConfig(scale=1.0),
    train=TrainConfig(
        output_dir="runs/dmd_sd15",
        max_train_steps=39_000,
        train_batch_size=2048,
        learning_rate=1e-5,
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
