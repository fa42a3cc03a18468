"""TCM: its law of times; off it is CT to the bit; its loss by hand; its fixed point for a Gaussian. All in float64."""

import math
from dataclasses import replace

import pytest
import torch
from gaussian import F64, SCHEDULES, Oracle, Whitened, problem
from scipy.stats import kstest
from scipy.stats import t as student_t
from tiny import tiny
from torch import nn

from distill.diffusion.curriculum import ECTCurriculum
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed, LogNormal, StudentT
from distill.methods import CT, TCM
from distill.random import Draw
from distill.roles import Nets

N = 16
NEAR = ECTCurriculum(LogNormal(0.5, 1.0), q=8.0, every=10**9)  # 1 - s_r / s_t from .5 to 1


def turn(first=0, n=N):
    return Draw(0, 0, "student", torch.arange(first, first + n))


def nets_of(schedule):
    kind = "edm" if schedule == "edm" else "v"
    teacher, student, frozen = (tiny(SCHEDULES[schedule], kind, seed) for seed in range(3))
    return Nets(teacher, Student(student, (0.5,)), (2,), target=frozen)


def loss_of(method, nets, draw):
    """The loss and its gradient to the student."""
    x = draw.normal("real", (len(draw.samples), 2)).double()
    loss, _ = method.student_loss(x, nets, {}, draw)
    return loss, *torch.autograd.grad(loss, [*nets.student.denoiser.net.parameters()])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_law(schedule):
    """Student's law of the logarithm, cut at both ends: by scipy's distribution function."""
    path, law = SCHEDULES[schedule], StudentT(0.3, 0.5, 0.7, 0.4, 9.0)
    y = path.ratio(law(turn(n=4000), "t", 4000, path)).log()
    ends = [student_t.cdf((math.log(s) - 0.3) / 0.5, 0.7) for s in (0.4, 9.0)]
    share = (student_t.cdf((y.numpy() - 0.3) / 0.5, 0.7) - ends[0]) / (ends[1] - ends[0])
    assert kstest(share, "uniform").pvalue > 1e-3 and math.log(0.4) <= y.min() < -0.9 and 2.19 < y.max() <= math.log(9)
    usual = StudentT()(turn(n=4000), "t", 4000, path)
    assert float(path.ratio(usual).min()) >= 1 - 1e-9 and 0.5 < float((path.ratio(usual) < 1.5).double().mean()) < 0.75


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_off_is_ct(schedule):
    """Bit for bit, loss and gradient, with nothing cut off and nobody at the boundary; either is another loss."""
    nets, base = nets_of(schedule), CT(NEAR)
    off = TCM(NEAR, c=0.0, start=1e-9, boundary=0.0)
    want = loss_of(base, nets, turn())
    assert all(torch.equal(a, b) for a, b in zip(loss_of(off, nets, turn()), want))
    for on in (replace(off, start=1.0), replace(off, start=1.0, boundary=0.25)):
        assert not any(torch.equal(a, b) for a, b in zip(loss_of(on, nets, turn()), want))


@pytest.mark.level(1, "TCM")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_by_hand(schedule):
    """Every fourth sample stands at s'; targets below it are the frozen network's; means of both parts are added."""
    nets, path, draw = nets_of(schedule), SCHEDULES[schedule], turn()
    net, frozen = nets.student.denoiser, nets.target
    called = []
    frozen.net.register_forward_hook(lambda *a: called.append(torch.is_grad_enabled()))
    method = TCM(NEAR, c=0.03, start=1.2, weight=0.3)
    loss, *grads = loss_of(method, nets, draw)
    assert called == [False]
    x, eps = (draw.normal(name, (N, 2)).double() for name in ("real", "eps"))
    bound = torch.arange(N) % 4 == 3
    s = path.ratio(NEAR.times(draw, "t", N, path)).clamp(min=1.2).where(~bound, 1.2)
    s_r = s * NEAR.level_ratio(s, 0)
    t, r = path.time(s), path.time(s_r)
    x_r = path.diffuse(x, eps, r)
    low, high = frozen(x_r, r).x0, net(x_r, r).x0
    aim = torch.where((s_r == 0)[:, None], x, torch.where((s_r < 1.2)[:, None], low, high)).detach()
    assert 0 < (s_r[~bound] >= 1.2).sum() and 0 < ((0 < s_r[~bound]) & (s_r[~bound] < 1.2)).sum()
    d = ((net(path.diffuse(x, eps, t), t).x0 - aim).square().sum(1) + 0.03**2).sqrt() - 0.03
    want = (d / (s - s_r))[~bound].mean() + 0.3 * (d / (s - s_r))[bound].mean()
    torch.testing.assert_close(loss, want)
    for ours, hand in zip(grads, torch.autograd.grad(want, [*net.net.parameters()])):
        torch.testing.assert_close(ours, hand)


def test_the_boundarys_share():
    """It is exact over a batch, however that is cut into micro-batches, whose mean is the loss of all."""
    for rho, want in ((0.25, [3, 7, 11, 15]), (0.4, [2, 4, 7, 9, 12, 14]), (0.0, [])):
        assert TCM(boundary=rho).bound(turn()).nonzero()[:, 0].tolist() == want
    nets, method = nets_of("flow"), TCM(NEAR)
    parts = [loss_of(method, nets, turn(first, 2))[0] for first in range(0, N, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss_of(method, nets, turn())[0])


def test_where_the_student_may_be_called():
    """Two calls are at the first time and at s'; a time below s' is refused, with a tolerance of .1 per cent of s'."""
    method, path = TCM(start=2.0), SCHEDULES["flow"]
    level_2 = float(path.time(torch.tensor([2.0], dtype=F64)))  # 2 / 3
    assert method.call_times(2, 0.9, path) == (0.9, pytest.approx(level_2))
    assert [method.call_times(*at, path) for at in ((1, 0.9), (3, 0.9), (2, 0.6), (2, level_2))] == [None] * 4
    nets = nets_of("flow")
    for last, allowed in ((0.7, True), (level_2, True), (level_2 - 1e-4, True), (level_2 - 1e-3, False), (0.4, False)):
        nets.student = replace(nets.student, times=(0.9, last))
        if allowed:
            method.on_build(nets)
        else:
            with pytest.raises(ValueError, match=r"= \[9.0, .*start = 2.0 on: .* none of them below 0.666667"):
                method.on_build(nets)


def test_the_student_itself_at_the_boundary():
    """f is the student from s' on, and the frozen network below."""
    nets, x, t = nets_of("flow"), torch.ones(2, 2, dtype=F64), torch.tensor([0.5, 0.499], dtype=F64)
    student, frozen = nets.student.denoiser(x, t).x0, nets.target(x, t).x0
    assert torch.equal(TCM(start=1.0).f(nets, x, t, None), torch.stack([student[0], frozen[1]]))


class Gains(nn.Module):
    """x0 = law.mean + (g(s) + more) (x / alpha - law.mean), a matrix in the law's axes; `more` is 0 at first."""

    def __init__(self, law, g, path, kind):
        super().__init__()
        self.more = nn.Parameter(torch.zeros(2, dtype=F64))

        def predict(x, alpha, sigma):
            return law.mean + ((g(sigma / alpha) + self.more) * ((x / alpha - law.mean) @ law.axes)) @ law.axes.T

        self.oracle = Oracle(predict, path, kind)

    def forward(self, x, native):
        return self.oracle(x, native)


@pytest.mark.level(1, "TCM")
@pytest.mark.parametrize("bound", (True, False))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fixed_point(schedule, bound, monkeypatch):
    """f(x_t) = E[f(x_r) | x_t], whatever gain G the frozen f has there: of gain G(s_r) (var + s_r s_t) / (var + s_t^2).

    What the student says below s' plays no part; what the frozen network says there does.
    """
    law, path = problem(2)[0], SCHEDULES[schedule]
    monkeypatch.setattr(TCM, "bound", lambda self, draw: torch.full((16,), bound))
    curriculum = ECTCurriculum(Fixed(float(path.time(torch.tensor([0.8], dtype=F64)))), q=8.0, every=10**9)
    method = TCM(curriculum, "square", start=0.6)  # of s' and of .8, s_r is .32 and .45
    G = lambda s: 1 / (1 + s**2 + s)

    def best(s):
        s_r = s * curriculum.level_ratio(s, 0)
        return G(s_r) * (law.var + s_r * s) / (law.var + s**2)

    def slope(student, frozen):
        make = lambda g: Denoiser(Gains(law, g, path, "v"), path, "v")
        draw, net = Whitened(16, 2, ("real", "eps")), make(student)
        nets = Nets(make(G), Student(net, (0.5,)), (2,), target=make(frozen))
        x = law.mean + draw.columns["real"] @ torch.linalg.cholesky(law.cov).T
        (g,) = torch.autograd.grad(method.student_loss(x, nets, {}, draw)[0], net.net.more)
        return float(g.abs().max())

    assert slope(lambda s: torch.where(s > 0.59, best(s), 7.0), G) < 1e-10
    assert slope(best, best) > 1e-3 and slope(G, G) > 1e-3
