"""What a finished student or a teacher can do at inference, beyond its own pipeline."""
