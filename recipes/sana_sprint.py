"""SANA-Sprint: sCM and LADD on SANA, one to four steps of one student. Chen et al. 2025, arXiv 2503.09641.

`accelerate launch recipes/sana_sprint.py --data.cache CACHE`, a cache of prompts and images (pipelines.cache). Values
of the paper (SANA 0.6B and 1.6B alike) and the authors' code, which moves student and heads in turn and counts both;
here a step moves both, so its 20,000 and 4,000 are half as many. The teacher is theirs; one of your own comes from
recipes/sana_sprint_teacher.py. Not run at full size by us. Left out: LADD's heads on pairs of wrong texts, and CAME.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import Sprint
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=Sprint(taps=tuple(f"transformer_blocks.{i}" for i in (2, 8, 14, 19)), warmup=2000),
    data=Text(),
    teacher="Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers",
    family="sana",
    student=StudentConfig(steps=2),  # of sample grids and the export, whose pipeline takes one to four
    train=TrainConfig(
        output_dir="runs/sana_sprint",
        max_train_steps=10_000,
        train_batch_size=512,  # 32 A100 x 16
        learning_rate=2e-6,
        lr_warmup_steps=157,  # "5000" of a scheduler that advances by 32 a call, of the student's alone
        adam_beta1=0.9,
        max_grad_norm=0.1,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
