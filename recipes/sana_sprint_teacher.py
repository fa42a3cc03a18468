"""The teacher of SANA-Sprint: SANA fine-tuned with normalised queries and keys, told t in [0, 1]. arXiv 2503.09641.

`python -m pipelines.sana Efficient-Large-Model/Sana_1600M_1024px_diffusers runs/sana_sprint/base` makes the copy that
`accelerate launch recipes/sana_sprint_teacher.py --data.cache CACHE` trains, on prompts and images, with SANA's own law
of times. Its pipeline is what recipes/sana_sprint.py takes as --teacher. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import LogitNormal, ShiftedTimes
from distill.methods import Denoise
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=Denoise(p_drop=0.1, times=ShiftedTimes(LogitNormal(0.0, 1.0), 3.0)),  # SANA's code
    data=Text(),
    teacher="runs/sana_sprint/base",
    family="sana",
    student=StudentConfig(steps=4, renoise="ddim"),  # of sample grids: the flow's ODE
    train=TrainConfig(
        output_dir="runs/sana_sprint/teacher",
        max_train_steps=5000,  # paper
        train_batch_size=1024,  # paper
        learning_rate=2e-5,  # paper
        adam_beta1=0.9,  # the code's optimizer is CAME
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
