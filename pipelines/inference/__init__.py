"""Inference options of a finished student or a teacher, beyond its own pipeline."""
