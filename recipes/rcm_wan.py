"""rCM on Wan 2.1 text-to-video: sCM with distribution matching, one to four steps. Zheng et al. 2025, arXiv 2510.08431.

Real samples are the teacher's own: `python -m pipelines.pairs --pretrained_model_name_or_path WAN --prompts prompts.txt
--guidance 5`, 250,000 in the paper, then `accelerate launch recipes/rcm_wan.py --data.cache pairs`. Values of the
authors' code for 1.3 B parameters, but for the student's times: theirs, angles of pi / 2, 1.5, 1.4 and 1.0, are t = 1,
0.9338, 0.8529 and 0.6090, and these are the nearest four that a scheduler of diffusers carries. Their
attention has a kernel with a forward-mode rule; here a tangent takes the math kernel, whose memory grows with the
square of the tokens: begin with few frames (--frames). Published: VBench 84.43. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data.pairs import Pairs
from distill.diffusion.times import LogNormal
from distill.methods import RCM
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=RCM(guidance=5.0, times=LogNormal(0.7, 1.6), warmup=1000, dmd=0.01, every=4),
    data=Pairs(guidance=5.0),
    teacher="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    family="wan",
    student=StudentConfig(times=(1.0, 0.943777, 0.842883, 0.60898)),
    train=TrainConfig(
        output_dir="runs/rcm_wan",
        max_train_steps=8200,  # 10,000 of the authors', who turn in place of moving both
        train_batch_size=64,
        learning_rate=2e-6,
        fake_learning_rate=4e-7,
        lr_warmup_steps=100,  # of the student; the fake score, which begins later, has 100 of its own in their code
        adam_beta1=0.0,
        adam_weight_decay=0.01,
        ema_width=0.1,
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
