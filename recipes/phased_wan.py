"""Phased DMD on Wan 2.1 text-to-video: four steps, two experts. Fan et al. 2025, arXiv 2510.27684; LightX2V's laws.

`accelerate launch recipes/phased_wan.py --data.cache CACHE`, a cache of prompts (python -m pipelines.cache), trains the
expert of the first two steps; with `--output_dir runs/phased_wan --student.experts runs/phased_wan-1/checkpoint-3000`
the other, whose export is a WanPipeline of both: transformer, transformer_2 and boundary_ratio. Published on Wan 2.2
A14B, a teacher of two networks (not trained from here): optical flow 9.30, of DMD2 3.23, of the teacher 10.26. LightX2V
trains both experts at once, all their weights, at 2e-6, and names no adapters; here they follow each other, as in the
paper. Iterations are ours. Not run at full size by us.
"""

from distill.configuration import Config
from distill.data import Text
from distill.diffusion.times import ShiftedTimes, Uniform
from distill.methods import PhasedDMD
from distill.networks.lora import LoRA
from distill.training.config import StudentConfig, TrainConfig
from pipelines.families.wan import FAMILY
from pipelines.run import main

CONFIG = Config(
    method=PhasedDMD(
        guidance=5.0,  # LightX2V
        every=5,  # paper, LightX2V
        times=ShiftedTimes(
            Uniform(0.02, 0.98), 7.0
        ),  # LightX2V: 20 .. 980 of 1000, shifted by 7, of which a phase's part
        fake_times=ShiftedTimes(Uniform(0.02, 0.98), 7.0),
    ),
    data=Text(),
    teacher="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    family="wan",
    student=StudentConfig(
        steps=4,
        times=(1.0, 21 / 22, 0.875, 0.7),  # LightX2V: 1, .75, .5, .25 shifted by 7; the first phase ends at .875
        phases=2,
        renoise="ddim",  # paper: Euler
        lora=LoRA(rank=64, alpha=8, targets=FAMILY.lora_targets),  # paper: rank 64, alpha 8 (unverified); targets ours
    ),
    train=TrainConfig(
        output_dir="runs/phased_wan-1",
        max_train_steps=3000,
        train_batch_size=64,  # paper: 64 GPUs x 1 (unverified)
        learning_rate=5e-5,  # paper (unverified)
        fake_learning_rate=4e-7,  # paper, LightX2V: of a full copy
        adam_weight_decay=0.01,  # LightX2V
        max_grad_norm=10.0,  # LightX2V
        ema_half_life=0,  # LightX2V has no average
        gradient_checkpointing=True,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
