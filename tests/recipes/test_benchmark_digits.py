"""The benchmark of the loop, on a tiny network: that its parts measure what the table says."""

import torch

from benchmarks.digits import PASSES, Bench, bare, methods, needed, stall, steps, turns
from distill.training import checkpoint

TINY = Bench(output=None, batch=2, rounds=2, blocks=1, channels=(8, 8))


def test_passes_of_a_step():
    """DMD2's fake score is trained on the student's samples of the same step, SiD's on its own."""
    found = {name: " ".join(needed(method, PASSES[name])) for name, method in methods().items()}
    assert found["DMD2"] == "f n n ci f 2cf" and found["SiD"] == "n f f i i" and found["VSD"] == "f n n f"


def test_a_turn_moves_one_player():
    moved = lambda before, net: any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    turn = turns(methods()["DMD2"], "fake", TINY)
    state = turn()
    nets = state.nets.modules()
    before = {role: [p.clone() for p in net.parameters()] for role, net in nets.items()}
    turn()
    assert [role for role, net in nets.items() if moved(before[role], net)] == ["fake", "disc"]


def test_a_run_and_its_stalls(tmp_path):
    """A run takes at least about as long as its passes, and leaves a log and a checkpoint; a stall has two kinds."""
    method, passes = methods()["LCD"], needed(methods()["LCD"], PASSES["LCD"])
    alone, together = steps(method, passes, {kind: bare(kind, TINY) for kind in passes}, TINY, tmp_path / "run")
    assert 0 < alone < 2 * together  # other processes disturb both
    assert [folder.name for folder in checkpoint.list_intact_checkpoints(tmp_path / "run")] == ["checkpoint-50"]
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 6
    mib, sync, background = stall(method, TINY, tmp_path / "stall")
    assert mib > 0 and sync > 0 and background > 0
