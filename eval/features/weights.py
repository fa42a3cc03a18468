"""The folder that keeps weights and features, and the hash that identifies the weights of a network."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from torch import nn


def cache_folder() -> Path:
    """The folder of weights and features: $DISTILL_CACHE, by default runs/cache below the current folder."""
    return Path(os.environ.get("DISTILL_CACHE", "runs/cache"))


def weights_hash(net: nn.Module) -> str:
    """The first 12 hex digits of the SHA-256 of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
