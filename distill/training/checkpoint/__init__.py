"""Checkpoints: everything a run is, as safetensors and JSON; written whole or not at all. The teacher is not in them.

`checkpoint-N/` holds one file a role (student, fake, disc, proxy, weight, target), the student's average `ema`, one an
optimizer and `state.json`, with the size and BLAKE2b of each. What does not fit them is torn or corrupted: an older one
is used.
Of a sharded run each is a folder, where every process writes its parts (tensors.py); all processes save together.
Random numbers need no state (random.py), so a resumed run equals the uninterrupted one bit for bit.
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
