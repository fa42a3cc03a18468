"""The first stage of DisBack on the digits: the teacher learns the untrained student. Values ours.

`accelerate launch recipes/degradation_digits.py --teacher runs/digits/teacher`; its checkpoints are what counts, and
recipes/disback_digits.py goes back along them. The student is not trained: exported is the
teacher, called once.

Choose it to make the record that DisBack goes back along; it is no student.
"""

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.times import LogNormal
from distill.methods.disback import Degradation
from distill.training.config import StudentConfig, TrainConfig
from pipelines.run import main

CONFIG = Config(
    method=Degradation(fake_times=LogNormal(-1.0, 1.2)),  # the teacher's training law
    data=Digits(),
    validation_images=40,
    teacher="runs/digits/teacher",
    student=StudentConfig(sigma=2.5),  # as in recipes/disback_digits.py
    train=TrainConfig(
        output_dir="runs/digits/degradation",
        max_train_steps=400,
        train_batch_size=64,
        learning_rate=6e-4,
        checkpointing_steps=100,  # code
        checkpoints_total_limit=None,
        ema_half_life=0,
    ),
)

if __name__ == "__main__":
    main(CONFIG, doc=__doc__)
