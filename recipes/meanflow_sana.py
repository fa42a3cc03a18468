"""MeanFlow on SANA: one or two steps along the guided teacher's velocity. Geng et al. 2025, arXiv 2505.13447.

`accelerate launch recipes/meanflow_sana.py --data.cache CACHE`, a cache of prompts and images (python -m
pipelines.cache). Rate, Adam, average, warm-up, norm and floor are those of FastGen's distillation of a video model
(Wan), whose rate falls as 1 / sqrt(step) after 2,000 steps and whose r is never t; batch, guidance and teacher are
SANA-Sprint's, the rest is ours. That teacher is told t in [0, 1]: told 1000 t, the derivative of F in time would be a
thousand times as large (pipelines/families/sana.py). Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import LogitNormal
from distill.methods import MeanFlow
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=MeanFlow(velocity="teacher", guidance=4.5, times=LogitNormal(0.4, 1.0), floor=10.0, norm="rms", warmup=2000),
    data=Text(),
    teacher="Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers",
    family="sana",
    student=StudentConfig(steps=2, renoise="ddim"),  # each call goes to the time of the next
    train=TrainConfig(
        output_dir="runs/meanflow_sana",
        max_train_steps=20_000,
        train_batch_size=512,
        learning_rate=1e-5,
        adam_beta1=0.9,
        adam_beta2=0.99,
        max_grad_norm=1.0,  # ours; FastGen does not clip
        ema_width=0.01,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
