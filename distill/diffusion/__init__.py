"""The theory of diffusion: schedules, denoisers, guidance, solvers, students, laws of t."""
