"""SFD on SD 1.5: one step, forgets what certain words name, prompts alone. Chen et al. 2024, arXiv 2409.11219.

`accelerate launch recipes/sfd_sd15.py --data.cache CACHE --student.init RUN/checkpoint-N --fake.init RUN/checkpoint-N`,
RUN one of sid_sd15.py at kappa 4.5, CACHE one of prompts (python -m pipelines.cache), some with the words, and these
once more with others in place: `sed -n 's/\\bBrad Pitt\\b/a middle aged man/gIp' prompts.txt > more.txt`, then
`cat more.txt >> prompts.txt`. Values of the authors' script, which trains weights of 16 bits. Not run at full size by
us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import Grid
from distill.methods import SFD, SiD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SFD(
        SiD(
            alpha=1.0,
            kappa=(4.5, 4.5, 4.5, 4.5),
            times=Grid(1000, 20, 979),
            fake_times=Grid(1000, 20, 979),
            gain=1.0,
        ),
        weight=1.0,
        fake_weight=1.0,
    ),
    data=Text(forget=("Brad Pitt",), override=("a middle aged man",)),
    teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
    family="sd",
    student=StudentConfig(timestep=625),
    train=TrainConfig(
        output_dir="runs/sfd_sd15",
        max_train_steps=12_500,  # 100,000 samples, as the authors judge; the script goes on to a million
        train_batch_size=8,
        learning_rate=1e-6,
        fake_learning_rate=3e-6,
        ema_half_life=0,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
