"""PSO on a few pictures of a subject: SDXL-Turbo with a LoRA. Miao et al. 2024, arXiv 2410.03190; values of the code.

`accelerate launch recipes/pso_dreambooth_sdxl.py --data.images PICTURES`, a folder of pictures with captions that name
the subject by a rare word ("a photo of sks dog"); what the student made of these captions is what they come before. Any
finished student will do; an exported one is called as its folder says, whatever is said here. Not run at full size by
us; the authors made 20 samples of the student once, here they are new ones in each step.
"""

from distill.configuration import Config
from distill.data import Text
from distill.methods import OfflinePSO
from distill.networks.lora import LoRA
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=OfflinePSO(beta=5.0, loss="hinge", gamma=0.5, neg_defactor=0.1),
    data=Text(text="online"),
    teacher="stabilityai/sdxl-turbo",
    family="sdxl",
    student=StudentConfig(
        steps=4,  # 512 pixels; 999, 749, 499, 249
        scale=1.0,  # of LCMScheduler, which carries the export: unit noise, fresh between calls
        lora=LoRA(rank=16, alpha=16, targets=("to_q", "to_k", "to_v", "to_out.0")),
    ),
    train=TrainConfig(
        output_dir="runs/pso_dreambooth",
        max_train_steps=600,
        train_batch_size=4,  # 4 rounds of 1
        learning_rate=2e-4,
        adam_beta1=0.9,
        adam_weight_decay=1e-4,
        max_grad_norm=1.0,
        ema_half_life=0,
        gradient_checkpointing=True,  # ours
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
