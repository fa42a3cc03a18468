"""From a diffusers pipeline to a teacher, and from a student back to a pipeline."""

from pipelines.families import tiny
from pipelines.teacher import Teacher, load

__all__ = ["Teacher", "load", "tiny"]
