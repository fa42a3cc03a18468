"""Staying healthy: what is not finite is named, replayed and left out; a step that hangs is reported; signs of dying.

Started by torchrun, this file is a run of two processes of which the second one meets a NaN.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_trainer import METHODS, config, everything, nets_of, vectors

from distill import checkpoint, health
from distill.trainer import train

REAL = (2, "student", 5)  # whose real vector is not a number: the fake reads it, on the samples of the student


def ill(draw, at=(REAL,)):
    """`vectors` with NaNs in the real ones at the given steps, players and samples."""
    batch = vectors(draw)
    for step, player, sample in at:
        if (draw.step, draw.player) == (step, player):
            batch["real"][draw.samples == sample] = float("nan")
    return batch


def states(out, data=ill, nets=None, resume=None, accelerator=None, method="dmd2", **change):
    """The states of a run whose last layer is not a number from the start in none of its networks."""
    cfg = config(output_dir=f"{out}", gradient_accumulation_steps=2, **change)
    accelerator = accelerator or Accelerator(cpu=True)
    yield from train(METHODS[method], nets or nets_of(METHODS[method]), data, cfg, accelerator, resume)


# ---- what is not finite ----


def test_a_nan_is_named_and_replayed(tmp_path):
    """The message, and a folder from which the update is computed again, with the same finding, on other networks."""
    loop = states(tmp_path)
    _, state = next(loop), next(loop)
    before = everything(state)
    with pytest.raises(
        FloatingPointError, match="non-finite loss at step 2, player 'fake', rank 0: first bad"
    ) as error:
        next(loop)
    assert "tensor: batch/real (loss nan, samples 4 to 7)" in str(error.value)
    folder = tmp_path / "replay-2-fake"
    assert f"--replay {folder}" in str(error.value)
    names = {"replay.json", "rank0.safetensors", "checkpoint-2/state.json", "checkpoint-2/fake.safetensors"}
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert names <= files and {Path(name).suffix for name in files} == {".json", ".safetensors"}
    assert not checkpoint.found(tmp_path)  # a replay is no checkpoint of the run

    def empty(draw):
        raise AssertionError("a replay has its batch")

    nets = nets_of(METHODS["dmd2"])
    cfg = config(gradient_accumulation_steps=2)
    found = health.replay(folder, METHODS["dmd2"], nets, empty, cfg, Accelerator(cpu=True))
    assert [(one.samples, one.bad) for one in found[0]] == [([0, 1, 2, 3], None), ([4, 5, 6, 7], "batch/real")]
    first = json.loads((folder / "replay.json").read_text())["ranks"]["0"][0]
    assert found[0][0].loss == first["loss"] and math.isfinite(float(first["loss"]))  # the same to all its digits
    roles = {f"{role}.{name}": t for role, net in nets.modules().items() for name, t in net.state_dict().items()}
    assert roles and all(torch.equal(t, before[name]) for name, t in roles.items() if name.startswith("disc"))
