"""One thread, no network, fixed seeds, the golden files. The environment also reaches subprocesses."""

import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on two busy cores can be fifty times slower than one
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds():
    """Every test starts from the same random state, alone or in the suite."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """golden("sid/x.npz") -> Path of a stored file, golden() -> the folder; skips the test where it is absent."""
    folder = Path(os.environ.get("DISTILL_GOLDEN") or ROOT.parent / "shared" / "golden")

    def find(name="."):
        if not (folder / name).exists():
            reason = f"golden file {name!r} not found: point DISTILL_GOLDEN to the folder that holds it"
            pytest.skip(reason)
        return folder / name

    return find
