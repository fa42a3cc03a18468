"""PSO of a finished student of the digits: of two samples that of which a linear classifier is surer. Values ours.

`python recipes/digits_pso.py --teacher runs/digits/lcd/pipeline`: any exported student of two calls or more.

On lcd_digits.py's student, two sets of 4000 samples: the classifier's mean log p rises from -.051 to -.015, and another
network, which judged nothing here, reads .3 % of the digits as another than asked, not .8 %. It has a price: the
Frechet distance of that network's features to held-out scans grows from 14 to 29. With --learning_rate 4e-4 the loss
ends above log 2, where it began. Choose it where two samples can be compared, with or without a gradient.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.methods import PSO
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=PSO(reward="labels"),
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/lcd/pipeline",
    student=StudentConfig(steps=2),  # of --smoke alone, whose teacher is no student: else its teacher's
    train=TrainConfig(
        output_dir="runs/digits/pso",
        max_train_steps=300,
        train_batch_size=64,
        learning_rate=1e-4,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        adam_beta1=0.9,
        max_grad_norm=1.0,
        ema_half_life=1000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
