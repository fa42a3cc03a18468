"""TCM on the digits: one step, from ECT's student and the scans alone. Values ours unless a source is named.

`accelerate launch recipes/tcm_digits.py --teacher runs/digits/teacher --student.init runs/digits/ect/checkpoint-6000`,
which recipes/ect_digits.py has made; without --student.init the first stage is the teacher itself, which is no
consistency function. The teacher is not called.

Choose it after ECT or iCT, where one call matters and images abound. It is as good as its first stage below s', and no
student for levels below: two calls are at 20 and s'.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.curriculum import Closing
from distill.diffusion.times import StudentT
from distill.methods import TCM
from distill.ranges import MOST
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=TCM(Closing(StudentT(high=20.0), q=256.0, every=MOST)),  # the pairs of ect_digits' last stage
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=20.0),
    train=TrainConfig(
        output_dir="runs/digits/tcm",
        max_train_steps=4800,  # CD's 4000 make as many network calls
        train_batch_size=64,
        learning_rate=5e-4,
        lr_scheduler="linear",
        lr_warmup_steps=20,
        adam_beta1=0.9,
        ema_half_life=20_000,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
