"""BOOT: at the teacher's own signals there is no residual; one step of the grid is a regression. float64."""

from dataclasses import replace

import pytest
import torch
from gaussian import F64, SCHEDULES, encode, exact, level, problem
from tiny import clock, filled
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.end_time import add_end_time
from distill.diffusion.schedule import KINDS, Flow
from distill.diffusion.student import Student
from distill.method import Requirement
from distill.methods import BOOT, Regression
from distill.random import Draw
from distill.roles import Nets

N = 16
PAIRS = [(s, k) for s in SCHEDULES for k in KINDS if k != "eps" or s in ("vp", "edm")]


class Doubles(Draw):
    def normal(self, name, shape):
        return super().normal(name, shape).double()


def draw_of():
    return Doubles(0, 0, "student", torch.arange(N))


class Signal(nn.Module):
    """y(z, s) of a Gaussian teacher: its trajectory starts at alpha_T D(sigma_T z) + sigma_T z."""

    def __init__(self, law, schedule, kind, first):
        super().__init__()
        self.law, self.schedule, self.kind, self.first = law, schedule, kind, first

    def forward(self, x, native, end=None):
        top = alpha, sigma = level(self.schedule, native)
        s = torch.zeros(len(x), dtype=F64) if end is None else self.first * end
        a, b = (c[:, None] for c in self.schedule.coefficients(s))
        start = self.law.denoise(x, alpha, sigma)
        y = (self.law.carry(alpha * start + x, top, (a, b)) - b * x / sigma) / a.clamp(min=1e-9)
        y = torch.where(s[:, None] > self.first - 1e-9, start, y)
        return encode(self.kind, x, y, alpha, sigma)


@pytest.mark.level(1, "BOOT")
@pytest.mark.parametrize("schedule, kind", PAIRS)
class TestSignal:
    def residual(self, schedule, kind, solver, N=25, first=1.0, law=None, **change):
        data, path = problem(2)[0], SCHEDULES[schedule]
        student = Student(Denoiser(Signal(law or data, path, kind, first), path, kind), (first,))
        nets = Nets(exact(data, path, kind), student, (2,))
        method = replace(BOOT(N=N, solver=data.step if solver == "exact" else solver), **change)
        logs = method.student_loss(method.sample(nets, {}, draw_of()), nets, {}, draw_of())[1]
        return float(logs["delta"]) ** 0.5, float(logs["boundary"])

    @pytest.mark.parametrize("first", (1.0, 0.8))
    def test_vanishes_with_the_exact_step(self, schedule, kind, first):
        delta, boundary = self.residual(schedule, kind, "exact", first=first)
        assert delta < 1e-10 and boundary < 1e-20

    def test_does_not_vanish_elsewhere(self, schedule, kind):
        law = problem(2)[0]
        other = type(law)(law.mean + 0.3, 1.5 * law.cov)
        delta, boundary = self.residual(schedule, kind, "exact", law=other)
        assert delta > 1e-3 and boundary > 1e-8

    def test_falls_with_the_grid(self, schedule, kind):
        """DDIM's error of one step is O(1 / N^2); Heun's is less."""
        coarse, fine = (self.residual(schedule, kind, "ddim", n, 0.8)[0] for n in (100, 200))
        assert 3.2 < coarse / fine < 4.8
        assert self.residual(schedule, kind, "heun", 200, 0.8)[0] < 0.5 * fine


def trained(schedule="flow", classes=0, T=0.9):
    path, kind = SCHEDULES[schedule], "edm" if schedule == "edm" else "v"
    net = add_end_time(clock(path, kind, 1, classes=classes))
    net.net.end = filled(net.net.end, 5, F64)
    return Nets(clock(path, kind, 0, classes=classes), Student(net, (T,)), (2,))


def turn(method, nets, batch):
    loss, logs = method.student_loss(method.sample(nets, batch, draw_of()), nets, batch, draw_of())
    return loss.detach(), logs, torch.autograd.grad(loss, [*nets.student.denoiser.net.parameters()])


def test_one_step_of_the_grid_is_a_regression():
    """N = 1 without the boundary: the regression onto the teacher's one-step samples, to the bit; on, it is another."""
    nets = trained(T=1.0)
    z = draw_of().normal("z", (N, 2))
    with torch.no_grad():
        y = nets.teacher(z, torch.ones(N, dtype=F64)).x0
    nets.student.denoiser.net.end.linear_2.weight.data.zero_()  # untold is told 0
    loss, _, grad = turn(BOOT(N=1, boundary=0.0), nets, {})
    batch, method = {"z": z, "y": y}, Regression("mse")
    want = method.student_loss(method.sample(nets, batch, draw_of()), nets, batch, draw_of())[0]
    assert torch.equal(loss, want.detach())
    right = torch.autograd.grad(want, [*nets.student.denoiser.net.parameters()], allow_unused=True)
    assert all(torch.equal(g, h) for g, h in zip(grad, right, strict=True) if h is not None)
    assert not torch.equal(turn(BOOT(N=2, boundary=0.0), nets, {})[0], loss)
    assert not torch.equal(turn(BOOT(N=1), nets, {})[0], loss)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_by_hand(schedule, reduction):
    """y_t + w (D^k - y_t), over w^2, with guidance; the boundary; the gradient is that of y(z, s) and y(z, T) alone."""
    nets, method = trained(schedule, classes=3), BOOT(N=10, guidance=2.5, boundary=0.7, reduction=reduction)
    c, null, T = {"label": torch.arange(N) % 3}, {"label": torch.full((N,), 3)}, torch.full((N,), 0.9, dtype=F64)
    z, path, net = draw_of().normal("z", (N, 2)), nets.teacher.path, nets.student.denoiser
    t = 0.9 * (0.1 + 0.9 * draw_of().uniform("t", (N,)).double())
    s = t - 0.09
    col = lambda a: a[:, None]
    top = col(path.coefficients(T)[1]) * z
    y = lambda at: net(top, T, c | {"end": at / 0.9}).x0
    D = lambda x, t: nets.teacher(x, t, null).x0 + 2.5 * (nets.teacher(x, t, c).x0 - nets.teacher(x, t, null).x0)
    (a, b), (a1, b1) = path.coefficients(t), path.coefficients(s)
    w = col(1 - (a / b) / (a1 / b1))
    y_t = y(t)
    target = (y_t + w * (D(col(a) * y_t + col(b) * z, t) - y_t)).detach()
    elements = ((y(s) - target) / w) ** 2 + 0.7 * (y(T) - D(top, T).detach()) ** 2
    want = elements.mean() if reduction == "mean" else elements.sum() / N
    loss, _, grad = turn(method, nets, {"c": c})
    torch.testing.assert_close(loss, want.detach(), rtol=1e-8, atol=0)
    for got, right in zip(grad, torch.autograd.grad(want, [*net.net.parameters()]), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-7)
    assert method.requirements == (Requirement.END_TIME, Requirement.NULL_CONDITION)
    assert BOOT().requirements == (Requirement.END_TIME,)


def test_starts_at_the_boundary():
    """A student that is the teacher, with a second time of zero weights, is right at T."""
    teacher = clock(Flow(), "flow")
    nets = Nets(teacher, Student(add_end_time(teacher.copy()), (0.9,)), (2,))
    assert float(turn(BOOT(), nets, {})[1]["boundary"].detach()) == 0
