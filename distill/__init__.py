"""One-step diffusion distillation: the theory (schedules, denoisers, students, losses) and the co-training loop."""

__version__ = "0.1.0"  # setup.cfg reads it
