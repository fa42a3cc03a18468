"""One-step diffusion distillation: the theory (schedules, denoisers, students, losses) and the co-training loop."""
