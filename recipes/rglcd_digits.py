"""RG-LCD on the digits: consistency distillation and a reward that the student knows by proxy. Values ours unless said.

`accelerate launch recipes/rglcd_digits.py --teacher runs/digits/teacher`. The reward is how sure a linear classifier is
of the label; the digits have no decoder, so here the proxy only stands between. --method.weight 0 is CD itself.

Choose it where a reward of pictures has no gradient, or one that costs a decoder too much. The proxy is right only near
what it has seen: watch proxy_right, and keep the weight below where the student outruns it.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.methods import LCD, Proxied
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=Proxied(
        LCD(N=18, solver="heun", guidance=1.3, target_ema=0.9, huber_c=0.1),  # lcd_digits
        weight=0.01,
        reward="labels",
        tau=1.0,  # log p of a label, no cosine
    ),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(steps=2),  # sigma 80, then 0.625
    train=TrainConfig(
        output_dir="runs/digits/rglcd",
        max_train_steps=2750,  # CD's 4000 make as many network calls
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        adam_beta1=0.9,
        ema_half_life=20_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
