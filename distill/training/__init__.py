"""The training loop: state, checkpoints, precision, non-finite gradients, logs."""
