"""DMD: DMD2's matching without a GAN, and a regression that picks one of the maps which matching can't tell apart."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import (
    F64,
    RATIOS,
    SCHEDULES,
    Line,
    Whitened,
    exact,
    kl_gradient,
    nets_of,
    problem,
    student_gradient,
    white,
)
from tiny import tiny

from distill.diffusion.solver import sample
from distill.diffusion.times import Fixed
from distill.method import Requirement
from distill.methods import DMD, DMD2
from distill.random import Draw
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train

N = 64
BARE = DMD(regression=0.5, distance="mse", normalise=False, reduction="sum")


def near(got, want, rtol=1e-10):
    assert (got - want).norm() <= rtol * want.norm(), f"off by {(got - want).norm() / want.norm():.3g}"


def ode(law, path, z):
    """The exact trajectory's end as a map of the noise, and its values at z."""
    start, end = (path.coefficients(torch.tensor([t], dtype=F64)) for t in (1.0, 0.0))
    carried = lambda z: law.carry(start[1] * z, start, end) / end[0]
    b = carried(torch.zeros_like(z[:1]))[0]
    return Line((carried(torch.eye(z.shape[1], dtype=F64)) - b).T, b), carried(z)


def gradient(method, law, line, path, t):
    """Gradient to (A, b), the fake optimal, on pairs of the exact ODE."""
    z = white(N, len(line.b), seed=1)
    batch = {"z": z, "y": ode(law, path, z)[1]}
    nets = nets_of(line, exact(law, path), fake=exact(line.law, path))
    method = replace(method, times=Fixed(float(t)))
    return student_gradient(method, nets, Whitened(N, len(line.b)), batch)[1:]


@pytest.mark.level(1, "DMD")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradient(schedule):
    """s^2 of the KL's, and lambda of the squared distance of the maps."""
    (law, line), path = problem(3), SCHEDULES[schedule]
    best, _ = ode(law, path, white(N, 3))
    for t in path.time(torch.tensor(RATIOS, dtype=F64)):
        s = float(path.ratio(t))
        A, b = line.A.detach(), line.b.detach()
        kl = kl_gradient(law, A, b, s)
        for got, match, to in zip(gradient(BARE, law, line, path, t), kl, (A - best.A, b - best.b)):
            near(got, (s**2 * match + 0.5 * 2 * to).detach())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_of_all_maps_with_the_right_law_it_picks_the_odes(schedule):
    """A rotated map has no gradient without the regression; with it, descent comes to the map of the ODE."""
    (law, _), path = problem(2), SCHEDULES[schedule]
    best, _ = ode(law, path, white(N, 2))
    turn = torch.tensor([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]], dtype=F64)
    square = law.axes @ law.var.sqrt().diag() @ law.axes.T  # the map at infinite time: exactly the law's
    line, t = Line(square @ turn, law.mean), path.time(torch.tensor(1.0, dtype=F64))
    assert all(g.norm() < 1e-12 for g in gradient(replace(BARE, regression=0.0), law, line, path, t))
    before = (line.A - best.A).norm()
    for _ in range(150):
        dA, db = gradient(BARE, law, line, path, t)
        with torch.no_grad():
            line.A -= 0.2 * dA
            line.b -= 0.2 * db
    assert before > 0.5 and (line.A - best.A).norm() < 0.05 * before


class TestWithoutRegression:
    """It is DMD2 without its GAN, at one step of the fake a step, bit for bit; with it the pairs come closer."""

    BASE = DMD2(guidance=1.5, every=1, gan=0, gan_fake=0)
    METHOD = DMD(guidance=1.5, regression=0.0)
    C = torch.arange(16) % 3

    def data(self, teacher):
        z = Draw(0, 0, "pairs", torch.arange(16)).normal("z", (16, 2))
        y = sample(teacher, z, {"label": self.C}, 10)
        return lambda draw: {"z": z, "y": y, "c": {"label": self.C}}, z, y

    def run(self, method, steps=4, schedule="edm"):
        kind = "edm" if schedule == "edm" else "v"
        teacher = tiny(SCHEDULES[schedule], kind, dtype=torch.float32, classes=3)
        data, z, y = self.data(teacher)
        nets = build(method, teacher, (2,), {"label": self.C[:1]}, StudentConfig(sigma=2.5))
        cfg = TrainConfig(max_train_steps=steps, train_batch_size=16, learning_rate=3e-3)
        *_, state = train(method, nets, data, cfg, Accelerator(cpu=True))
        with torch.no_grad():
            x = nets.student.generate(z, {"label": self.C})
        return state, float((x - y).square().mean())

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_bit_for_bit(self, schedule):
        (ours, _), (base, _) = (self.run(method, schedule=schedule) for method in (self.METHOD, self.BASE))
        assert ours.logs.keys() == base.logs.keys() and all(torch.equal(ours.logs[k], base.logs[k]) for k in base.logs)
        for role, net in ours.nets.modules().items():
            assert all(torch.equal(a, b) for a, b in zip(net.parameters(), base.nets.modules()[role].parameters()))

    def test_with_it_the_pairs_come_closer(self):
        apart = self.run(self.METHOD, 60)[1]
        state, close = self.run(replace(self.METHOD, regression=1.0, distance="mse"), 60)
        assert close < 0.5 * apart, (close, apart)
        assert state.logs.keys() >= {"student/regression", "student/score_gap", "fake/loss"}

    def test_needs(self):
        assert self.METHOD.requirements == (Requirement.NULL_CONDITION,) and DMD(regression=0).requirements == ()
        assert DMD().requirements == (Requirement.PAIRS, Requirement.PERCEPTUAL_DISTANCE)
        assert DMD(2.0, distance="huber").requirements == (Requirement.NULL_CONDITION, Requirement.PAIRS)
