"""MeanFlow: r = t is flow matching to the bit, and the average velocity of a Gaussian flow has no residual. float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from gaussian import F64, SCHEDULES, Gaussian, Whitened, encode, exact, level, problem
from tiny import clock, filled
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.end_time import add_end_time, average, with_end_key
from distill.diffusion.schedule import KINDS, Flow
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed, TimeDistribution, Uniform
from distill.method import Requirement
from distill.methods import MeanFlow
from distill.random import Draw
from distill.roles import Nets

N = 12
PAIRS = [(s, k) for s in SCHEDULES for k in KINDS if k != "eps" or s in ("vp", "edm")]
POINT = Gaussian(torch.tensor([0.7, -0.4], dtype=F64), torch.zeros(2, 2, dtype=F64))


class Average(nn.Module):
    """The average velocity of a Gaussian's flow, (x_t - x_r) / (t - r), plus A x_t + b; told nothing, r = 0."""

    def __init__(self, law, schedule, kind):
        super().__init__()
        self.law, self.schedule, self.kind = law, schedule, kind
        self.A, self.b = nn.Parameter(torch.zeros(2, 2, dtype=F64)), nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, x, native, end=None):
        alpha, sigma = level(self.schedule, native)
        t, x = sigma / (alpha + sigma), x / (alpha + sigma)
        r = torch.zeros_like(t) if end is None else end[:, None]
        same = (t - r).abs() < 1e-9
        apart = torch.where(same, torch.ones_like(t), t - r)
        chord = (x - self.law.carry(x, (1 - t, t), (1 - r, r))) / apart
        x0 = self.law.denoise(x, 1 - t, t)
        F = torch.where(same, (x - x0) / t, chord) + x @ self.A.T + self.b
        return encode(self.kind, x * (alpha + sigma), x - t * F, alpha, sigma)


def nets_of(law, schedule, kind):
    path = SCHEDULES[schedule]
    return Nets(exact(law, path, kind), Student(Denoiser(Average(law, path, kind), path, kind), (0.9,)), (2,))


class Doubles(Draw):
    def normal(self, name, shape):
        return super().normal(name, shape).double()


def draw_of(n=N, step=0):
    return Doubles(0, step, "student", torch.arange(n))


METHOD = MeanFlow(velocity="teacher", times=Uniform(0.1, 0.9), equal=0.0)


@pytest.mark.level(1, "MeanFlow")
@pytest.mark.parametrize("schedule, kind", PAIRS)
class TestIdentity:
    def delta(self, schedule, kind, method=METHOD, law=None, student=None):
        law = law or problem(2)[0]
        nets = nets_of(law, schedule, kind)
        if student is not None:
            nets.student.denoiser.net.law = student
        real = POINT.mean.expand(N, 2)
        return float(method.student_loss(real, nets, {}, draw_of())[1]["delta"]) ** 0.5

    def test_vanishes(self, schedule, kind):
        assert self.delta(schedule, kind) < 1e-10

    def test_vanishes_for_a_point(self, schedule, kind):
        """All data at one point: eps - x is the velocity itself."""
        method = replace(METHOD, velocity="data")
        assert self.delta(schedule, kind, method, Gaussian(POINT.mean, 1e-30 * torch.eye(2, dtype=F64))) < 1e-10

    def test_does_not_vanish_elsewhere(self, schedule, kind):
        law = problem(2)[0]
        assert self.delta(schedule, kind, student=Gaussian(law.mean, 2 * law.cov)) > 0.05


@dataclass(frozen=True)
class Two(TimeDistribution):
    """t and r."""

    t: float = 0.8
    r: float = 0.3

    def __call__(self, draw, name, B, schedule):
        return torch.full((B,), {"t": self.t, "r": self.r}[name], dtype=F64)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("times", (Two(), Two(0.3, 0.8), Fixed(0.5)), ids=("t", "r", "equal"))
def test_data_give_the_same_optimum(schedule, times):
    """Of images and noise the expected gradient is 0 at the average velocity, and is not beside it."""
    law, _ = problem(2)
    nets, draw = nets_of(law, schedule, "x0"), Whitened(64, 2, ("real", "eps"))
    real = law.mean + draw.columns["real"] @ torch.linalg.cholesky(law.cov).T
    method = replace(METHOD, velocity="data", times=times, p=0.0)
    net = nets.student.denoiser.net
    found = torch.autograd.grad(method.student_loss(real, nets, {}, draw)[0], (net.A, net.b))
    assert max(float(g.abs().max()) for g in found) < 1e-9
    net.b.data += 0.1
    (beside,) = torch.autograd.grad(method.student_loss(real, nets, {}, draw)[0], net.b)
    torch.testing.assert_close(beside, torch.full((2,), 0.2, dtype=F64), rtol=1e-8, atol=1e-8)


def trained(kind="flow", seed=1, classes=0, path=Flow()):
    """Teacher and student with a second time that is heard."""
    net = add_end_time(clock(path, kind, seed, classes=classes))
    net.net.end = filled(net.net.end, 5, F64)
    return Nets(clock(path, kind, 0, classes=classes), Student(net), (2,))


def gradient(loss, net):
    return torch.autograd.grad(loss, [*net.parameters()], allow_unused=True)


@pytest.mark.parametrize("schedule, kind", PAIRS)
@pytest.mark.parametrize("once", (True, False))
def test_equal_times_are_flow_matching(schedule, kind, once):
    """To the bit, loss and gradient; with r < t they are others."""
    nets, draw = trained(kind, path=SCHEDULES[schedule]), draw_of()
    real, t = draw.normal("real", (N, 2)), torch.full((N,), 0.4, dtype=F64)
    method = MeanFlow(times=Fixed(0.4), equal=1.0, p=0.0, one_pass=once)
    loss = method.student_loss(real, nets, {}, draw)[0]
    net, eps = nets.student.denoiser.on_schedule(Flow()), draw.normal("eps", (N, 2))
    F = average(net, Flow().diffuse(real, eps, t), t, t, None)
    want = (F - (eps - real)).square().flatten(1).sum(1).mean()
    assert torch.equal(loss, want)
    for got, right in zip(gradient(loss, net.net), gradient(want, net.net), strict=True):
        assert torch.equal(got, right)
    apart = replace(method, times=Two(0.4, 0.1), equal=0.0).student_loss(real, nets, {}, draw)[0]
    assert abs(float((apart - want).detach())) > 1e-3


def test_derivative_by_differences():
    """g = F - v + (t - r) dF/dt, the derivative along v by central differences; its warm-up; both kinds of pass."""
    nets, draw = trained(), draw_of(step=3)
    real, net = draw.normal("real", (N, 2)), nets.student.denoiser
    t, r, eps = torch.full((N,), 0.8, dtype=F64), torch.full((N,), 0.3, dtype=F64), draw.normal("eps", (N, 2))
    x_t, v, h = Flow().diffuse(real, eps, t), eps - real, 1e-5
    F = lambda s: average(net, x_t + s * v, t + s, r, None)
    dF = (F(h) - F(-h)) / (2 * h)
    g = (F(0) - v + 0.5 * dF).detach()
    method = MeanFlow(times=Two(), equal=0.0)
    size = g.square().sum(1)
    loss, logs = method.student_loss(real, nets, {}, draw)
    torch.testing.assert_close(logs["delta"], g.square().mean(), rtol=1e-7, atol=0)
    torch.testing.assert_close(loss.detach(), (size / (size + 0.01)).mean(), rtol=1e-7, atol=0)
    wanted = gradient(((F(0) * 2 * g).sum(1) / (size + 0.01)).mean(), net.net)
    for once in (True, False):
        loss = replace(method, one_pass=once).student_loss(real, nets, {}, draw)[0]
        for got, want in zip(gradient(loss, net.net), wanted):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    half = replace(method, warmup=6, p=0.0).student_loss(real, nets, {}, draw)[1]["delta"]
    torch.testing.assert_close(half, (F(0) - v + 0.25 * dF).square().mean().detach(), rtol=1e-7, atol=0)


def test_guidance():
    """The teacher's is 2B samples; in F itself conditions are dropped, and a dropped sample keeps v."""
    nets, draw = trained(classes=3), draw_of()
    real, c = draw.normal("real", (N, 2)), {"label": torch.arange(N) % 3}
    t, net = torch.full((N,), 0.4, dtype=F64), nets.student.denoiser
    eps = draw.normal("eps", (N, 2))
    x_t = Flow().diffuse(real, eps, t)
    null = {"label": torch.full((N,), 3)}
    base = MeanFlow(times=Fixed(0.4), equal=1.0, p=0.0)
    assert base.requirements == (Requirement.REAL, Requirement.END_TIME)
    assert replace(base, kappa=0.5).requirements == (
        Requirement.REAL,
        Requirement.END_TIME,
        Requirement.NULL_CONDITION,
    )
    of = lambda method: method.student_loss(real, nets, {"real_c": c}, draw)[1]["delta"]
    teach = nets.teacher
    v = teach(x_t, t, null).flow + 3 * (teach(x_t, t, c).flow - teach(x_t, t, null).flow)
    want = (average(net, x_t, t, t, c) - v).square().mean().detach()
    torch.testing.assert_close(of(replace(base, velocity="teacher", guidance=3.0)), want, rtol=1e-9, atol=0)
    drop = draw.uniform("drop", (N,)) < 0.4
    assert 0 < int(drop.sum()) < N
    some = {"label": torch.where(drop, 3, c["label"])}
    v = eps - real
    own = 0.5 * v + 0.1 * average(net, x_t, t, t, null) + 0.4 * average(net, x_t, t, t, some)
    want = (average(net, x_t, t, t, some) - torch.where(drop[:, None], v, own)).square().mean().detach()
    method = replace(base, omega=0.5, kappa=0.4, p_drop=0.4)
    torch.testing.assert_close(of(method), want, rtol=1e-9, atol=0)
    loss = method.student_loss(real, nets, {"real_c": c}, draw)[0]  # v has no gradient, though it is of F itself
    aim = torch.where(drop[:, None], v, own).detach()
    wanted = gradient((average(net, x_t, t, t, some) - aim).square().sum(1).mean(), net.net)
    for got, want in zip(gradient(loss, net.net), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("once, recomputed, passes", ((True, False, 1), (False, False, 2), (True, True, 2)))
def test_passes(once, recomputed, passes):
    """One pass of the student for value and derivative; two if asked for, or if its blocks are recomputed."""
    nets, draw, calls = trained(), draw_of(), []
    net = nets.student.denoiser.net
    net.is_gradient_checkpointing = recomputed
    net.register_forward_hook(lambda *a: calls.append(1))
    MeanFlow(times=Two(), equal=0.0, one_pass=once).student_loss(draw.normal("real", (N, 2)), nets, {}, draw)
    assert len(calls) == passes


def test_told_its_end():
    """The network hears r, not t - r: with another r it says something else."""
    nets, draw = trained(), draw_of()
    said = []
    nets.student.denoiser.net.end.register_forward_hook(lambda m, a, o: said.append(a[0]))
    MeanFlow(times=Two(), equal=0.0).student_loss(draw.normal("real", (N, 2)), nets, {}, draw)
    assert said and all(torch.equal(r, torch.full((N,), 0.3, dtype=F64)) for r in said)
    assert "end" in with_end_key(None, said[0])


def test_interval():
    """Guidance, of the teacher or of F itself, where t is in the interval, its ends too; elsewhere v is unguided."""
    nets, draw = trained(classes=3), draw_of()
    real, c = draw.normal("real", (N, 2)), {"label": torch.arange(N) % 3}
    base = MeanFlow(times=Fixed(0.4), equal=1.0, p_drop=0.0)
    of = lambda method: method.student_loss(real, nets, {"real_c": c}, draw)[1]["delta"]
    for change in ({"omega": 0.5, "kappa": 0.4}, {"velocity": "teacher", "guidance": 3.0}):
        method, plain = replace(base, **change), replace(base, velocity=change.get("velocity", "data"))
        for interval in ((0.4, 1.0), (0.0, 0.4)):
            assert torch.equal(of(replace(method, interval=interval)), of(method))
        for interval in ((0.41, 1.0), (0.0, 0.39)):
            torch.testing.assert_close(of(replace(method, interval=interval)), of(plain), rtol=1e-12, atol=0)
        assert abs(of(method) - of(plain)) > 1e-3


def test_a_law_of_its_own_for_r():
    said, nets = [], trained()
    nets.student.denoiser.net.end.register_forward_hook(lambda m, a, o: said.append(a[0]))
    real = draw_of().normal("real", (N, 2))
    for method in (
        MeanFlow(times=Fixed(0.8), end_times=Fixed(0.3), equal=0.0),
        MeanFlow(times=Fixed(0.3), end_times=Fixed(0.8), equal=0.0),
    ):
        method.student_loss(real, nets, {}, draw_of())
    assert said and all(torch.equal(r, torch.full((N,), 0.3, dtype=F64)) for r in said)


@pytest.mark.parametrize("norm, unit", (("vector", 1.0), ("rms", 2**0.5)))
def test_norm_of_the_tangent(norm, unit):
    """The gradient to F is 2 g' / B, g' = (g / unit) / (|g / unit| + floor)^p: elements do not change it under rms."""
    method, g = MeanFlow(norm=norm, floor=10.0, p=1.5), draw_of().normal("g", (N, 2)) * 30
    F = draw_of().normal("F", (N, 2)).requires_grad_()
    loss = method.distance(F, g)
    (slope,) = torch.autograd.grad(loss.mean(), F)
    want = g / unit / ((g / unit).norm(dim=1, keepdim=True) + 10) ** 1.5
    torch.testing.assert_close(slope, 2 * want / N, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, want.square().sum(1), rtol=1e-12, atol=0)
    wide = method.distance(F.repeat(1, 50), g.repeat(1, 50))
    ratio = float((wide / loss).mean())
    assert ratio == pytest.approx(1.0) if norm == "rms" else ratio < 0.9


def test_several_calls_follow_the_trajectory():
    """The exact average velocity of a Gaussian, called two or five times, ends where its trajectory does."""
    law, _ = problem(2)
    for schedule, kind in (("flow", "flow"), ("vp", "v"), ("edm", "edm")):
        path = SCHEDULES[schedule]
        denoiser = nets_of(law, schedule, kind).student.denoiser
        z = draw_of().normal("z", (N, 2))
        for times in ((0.9, 0.4), (0.9, 0.7, 0.5, 0.3, 0.2)):
            student = Student(denoiser, times, renoise="ddim", jumps=True)
            alpha, sigma = path.coefficients(torch.tensor([0.9], dtype=F64))
            want = law.carry(
                sigma * z, (alpha[:, None], sigma[:, None]), (torch.ones(1, 1).double(), 0 * sigma[:, None])
            )
            torch.testing.assert_close(student.generate(z, None), want, rtol=1e-7, atol=1e-7)
        assert (replace(student, jumps=False).generate(z, None) - want).abs().max() > 1e-2
