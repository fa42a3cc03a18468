"""Checkpoints: the complete state of a run as safetensors and JSON, without the teacher. A checkpoint is complete or
absent.

`checkpoint-N/` holds one file per role (student, fake, disc, proxy, weight, target), the student's average `ema`, one
per optimizer, and `state.json` with the size and BLAKE2b of each file. A file whose size or hash differs is treated as
corrupt, and the previous checkpoint is used.
In a sharded run each of these is a folder to which every process writes its shards (tensors.py). Saving is collective.
Random numbers have no state (random.py), so a resumed run equals the uninterrupted one bit for bit.
"""

from distill.training.checkpoint.integrity import find_corruption, list_intact_checkpoints, read_step
from distill.training.checkpoint.read import load, load_initial_weights, weight_files
from distill.training.checkpoint.tensors import TensorReader, open_safetensors
from distill.training.checkpoint.write import Saver, describe_disk_error, save

__all__ = [
    "Saver",
    "TensorReader",
    "describe_disk_error",
    "find_corruption",
    "list_intact_checkpoints",
    "load",
    "load_initial_weights",
    "open_safetensors",
    "read_step",
    "save",
    "weight_files",
]
