"""NCT on SD 1.5: Canny edges for a finished one-step student, prompts alone. Luo et al. 2025, arXiv 2506.19741.

`accelerate launch recipes/nct_sd15.py --teacher runs/dmd2_sd15/pipeline --data.cache CACHE`: an exported student of one
step, and a cache of prompts (python -m pipelines.cache). The export is that student with a ControlNet beside it. The
paper's are the control and the average; batch and Adam are said to be theirs (unverified: their code cannot be had
here); length and rate are ours. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import NCT
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=NCT(control="canny"),
    data=Text(),
    teacher="runs/dmd2_sd15/pipeline",
    family="sd",
    student=StudentConfig(scale=1.0),  # of a generator that is no export; an export says itself how it is called
    train=TrainConfig(
        output_dir="runs/nct_sd15",
        max_train_steps=20_000,  # ours
        train_batch_size=128,  # (unverified)
        learning_rate=1e-5,  # ours
        adam_beta1=0.9,  # (unverified)
        adam_beta2=0.95,  # (unverified)
        ema_half_life=887_000,  # a decay of .9999 a step (paper)
        ema_ramp=None,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
