"""Losses and gradient norms of the first 20 toy steps of every method, stored: a refactor may not change them.

python tests/distill/test_invariants.py --write      stores them anew; say in the commit why they changed
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny

from distill.diffusion.schedule import EDM, Flow
from distill.methods import DMD2, LCD, SCM, VSD, SiD, SiDA
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train

FILE = Path(__file__).with_name("invariants.json")
RTOL, STEPS, CLASSES = 1e-4, 20, 3
METHODS = {
    "sid": SiD(),
    "sid-lsg": SiD(alpha=1.0, kappa=(1.5,) * 4, gain=1.0),
    "sida": SiDA(gan=0.5, kappa=(1.5,) * 4, taps=("mid",)),
    "dmd2": DMD2(guidance=1.75, every=2, taps=("mid",)),
    "vsd": VSD(guidance=(0.5, 4.0)),
    "lcd": LCD(guidance=(2.0, 4.0), huber_c=0.1),  # smooth: at its 1e-3 the sign of a small difference counts
    "scm": SCM(guidance=1.5, warmup=10),
}
SCHEDULES = {"edm": (EDM(), "edm"), "flow": (Flow(), "flow")}


def data(draw):
    """Conditions, and points near the corners of a triangle with theirs."""
    label = draw.integers("real", CLASSES)
    angle = 2 * torch.pi / CLASSES * label
    points = torch.stack((angle.cos(), angle.sin()), dim=1)
    return {
        "c": {"label": draw.integers("label", CLASSES)},
        "real": points + 0.1 * draw.normal("within", tuple(points.shape)),
        "real_c": {"label": label},
    }


def curves(method, schedule):
    """Every log of every step of a two-step student: {name: [value, ...]}."""
    path, kind = SCHEDULES[schedule]
    torch.set_num_threads(1)
    teacher = tiny(path, kind, seed=0, dtype=torch.float32, classes=CLASSES)
    config = StudentConfig(sigma=2.5, steps=2, renoise="fresh")
    nets = build(METHODS[method], teacher, (2,), {"label": torch.tensor([0])}, config)
    if nets.disc is not None:  # starts at random elsewhere
        for i, p in enumerate(nets.disc.parameters()):
            p.data = torch.linspace(-0.3, 0.4, p.numel()).roll(7 * i).reshape(p.shape)
    cfg = TrainConfig(max_train_steps=STEPS, train_batch_size=32, learning_rate=2e-3, adam_epsilon=1e-3)
    found = {}
    for state in train(METHODS[method], nets, data, cfg, Accelerator(cpu=True)):
        for name, value in state.logs.items():
            found.setdefault(name, []).append(float(value))
    return found


CASES = [(method, schedule) for method in METHODS for schedule in SCHEDULES]


@pytest.mark.parametrize("method, schedule", CASES)
def test_first_steps(method, schedule):
    want = json.loads(FILE.read_text())[f"{method} {schedule}"]
    got = curves(method, schedule)
    assert got.keys() >= want.keys()  # signs of health are not stored
    for name in want:
        zero = 0.1 * RTOL * max(map(abs, want[name]))  # of a loss that changes its sign
        assert got[name] == pytest.approx(want[name], rel=RTOL, abs=zero), name


def test_nothing_stored_is_stale():
    assert json.loads(FILE.read_text()).keys() == {f"{method} {schedule}" for method, schedule in CASES}


def rounded(curves):
    return {name: [float(f"{value:.6g}") for value in values] for name, values in curves.items()}


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    stored = {f"{method} {schedule}": rounded(curves(method, schedule)) for method, schedule in CASES}
    lines = (
        f'"{case}": {{\n ' + ",\n ".join(f'"{k}": {json.dumps(v)}' for k, v in c.items()) + "}"
        for case, c in stored.items()
    )
    FILE.write_text("{" + ",\n".join(lines) + "}\n")
