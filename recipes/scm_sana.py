"""sCM on SANA: continuous-time consistency, one to four steps. Lu & Song 2024, 2410.11081; SANA-Sprint 2503.09641.

`accelerate launch recipes/scm_sana.py --data.cache CACHE`, a cache of prompts and images (python -m pipelines.cache).
SANA-Sprint's values (of latents that it halves first, see distill/methods/sprint.py) without its adversarial loss and
its embedded guidance (a fixed one here, not run at full size): the paper's ablation has FID 8.93 on MJHQ for sCM alone,
8.11 with both, as in recipes/sana_sprint.py. The teacher is SANA-Sprint's, told t in [0, 1]: told 1000 t, as a plain
SANA, its derivative in time, which the tangent is made of, would be a thousand times as large (families/sana.py, which
makes such a copy of any SANA; fine-tune it with recipes/sana_sprint_teacher.py).
"""

import math

from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import LogNormal
from distill.methods import SCM
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=SCM(
        guidance=4.5,
        sigma_d=1.0,
        times=LogNormal(0.2 + math.log(2), 1.6),
        warmup=2000,  # 4,000 of the code, which counts the steps of the heads, too
        c=0.2,
        norm="vector",
        reduction="sum",
    ),
    data=Text(),
    teacher="Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers",
    family="sana",
    student=StudentConfig(steps=2),
    train=TrainConfig(
        output_dir="runs/scm_sana",
        max_train_steps=10_000,  # 20,000, likewise
        train_batch_size=512,
        learning_rate=2e-6,
        adam_beta1=0.9,
        max_grad_norm=0.1,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
