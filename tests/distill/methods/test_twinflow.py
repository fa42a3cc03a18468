"""RCGM and TwinFlow: the base to the bit, its fixed point, the twin's optimum, and a descent that is DMD's. float64."""

import math
from dataclasses import asdict, fields, replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, Gaussian, Line, Whitened, encode, exact, kl_gradient, level, problem
from tiny import clock, filled
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.end_time import add_end_time, average
from distill.diffusion.schedule import KINDS, Flow
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed
from distill.losses import adaptive
from distill.method import Requirement
from distill.methods import RCGM, TwinFlow
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import TrainConfig
from distill.training.loop import train

N = 12
PAIRS = [(s, k) for s in SCHEDULES for k in KINDS if k != "eps" or s in ("vp", "edm")]
POINT = torch.tensor([0.7, -0.4], dtype=F64)
FREE = {"clamp": 1e9, "c": None}  # no clamp, squared error


class Doubles(Draw):
    def normal(self, name, shape):
        return super().normal(name, shape).double()


def draw_of(n=N, step=0):
    return Doubles(0, step, "student", torch.arange(n))


def heard(schedule="flow", seed=1, classes=0):
    """A student whose second time is heard."""
    net = add_end_time(clock(SCHEDULES[schedule], "edm" if schedule == "edm" else "v", seed, classes=classes))
    net.net.end = filled(net.net.end, 5, F64)
    return net


def nets_of(schedule="flow", classes=0):
    student = heard(schedule, classes=classes)
    teacher = clock(SCHEDULES[schedule], student.kind, 0, classes=classes)
    return Nets(teacher, Student(student, (1.0,)), (2,), target=heard(schedule, 2, classes))


def gradient(loss, net):
    return torch.autograd.grad(loss, [*net.parameters()], allow_unused=True)


class Average(nn.Module):
    """The average velocity of a Gaussian's flow; with `line`, at end <= 0 its samples and, below 0, their velocity."""

    def __init__(self, law, schedule, kind, line=None):
        super().__init__()
        self.law, self.schedule, self.kind, self.line = law, schedule, kind, line
        self.A, self.b = nn.Parameter(torch.zeros(2, 2, dtype=F64)), nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, x, native, end=None):
        alpha, sigma = level(self.schedule, native)
        t, x_f = sigma / (alpha + sigma), x / (alpha + sigma)
        r = torch.zeros_like(t) if end is None else end[:, None]
        if self.line is not None and bool((r == 0).all()):
            return encode(self.kind, x, self.line(x / sigma, None), alpha, sigma)
        law = self.law if self.line is None or bool((r > 0).all()) else self.line.law
        same = (t - r.abs()).abs() < 1e-9
        chord = (x_f - law.carry(x_f, (1 - t, t), (1 - r.abs(), r.abs()))) / torch.where(
            same, torch.ones_like(t), t - r
        )
        F = torch.where(same, (x_f - law.denoise(x_f, 1 - t, t)) / t, chord)
        if bool((r < 0).all()):
            F = F + x_f @ self.A.T + self.b
        return encode(self.kind, x, x_f - t * F, alpha, sigma)


@pytest.mark.level(1, "RCGM")
@pytest.mark.parametrize("schedule, kind", PAIRS)
class TestBase:
    def residual(self, schedule, kind, law, real=None, **change):
        path = SCHEDULES[schedule]
        nets = Nets(exact(law, path, kind), Student(Denoiser(Average(law, path, kind), path, kind)), (2,))
        method, t = replace(RCGM(velocity="teacher" if real is None else "data"), **FREE | change), draw_of()
        t, r = torch.linspace(0.5, 0.9, N, dtype=F64), torch.linspace(0.05, 0.4, N, dtype=F64)
        eps = draw_of().normal("eps", (N, 2))
        x_t = Flow().diffuse(law.mean.expand(N, 2), eps, t)
        net = nets.student.denoiser.on_schedule(Flow())
        v = average(nets.teacher.on_schedule(Flow()), x_t, t, None, None) if real is None else eps - real
        return float(method.residual(average(net, x_t, t, r, None), x_t, t, r, v, net, None).square().mean()) ** 0.5

    def test_vanishes_for_a_point(self, schedule, kind):
        """There trajectories are straight, and the one Euler step of the target makes no error."""
        law = Gaussian(POINT, 1e-30 * torch.eye(2, dtype=F64))
        assert self.residual(schedule, kind, law, POINT.expand(N, 2)) < 1e-10

    def test_falls_with_the_step(self, schedule, kind):
        """O(d) at the average velocity of a Gaussian; elsewhere it does not fall."""
        law = problem(2)[0]
        coarse, fine = (self.residual(schedule, kind, law, step=d) for d in (0.02, 0.01))
        assert fine < 0.02 and coarse / fine == pytest.approx(2, abs=0.1)

    def test_any_number_of_jumps(self, schedule, kind):
        """An average velocity is consistent with itself: one jump or five."""
        law = problem(2)[0]
        one, five = (self.residual(schedule, kind, law, N=n) for n in (1, 5))
        assert one == pytest.approx(five, rel=1e-6)


class TestTurn:
    def test_equal_times_are_flow_matching(self):
        """Where t - r <= d the residual is F - v to the bit, whatever the target says."""
        method, t = RCGM(**FREE), torch.full((N,), 0.4, dtype=F64)
        F, x, v = (draw_of().normal(name, (N, 2)) for name in ("F", "x", "v"))
        net = heard()
        assert torch.equal(method.residual(F, x, t, t, v, net.on_schedule(Flow()), None), F - v)
        assert torch.equal(method.residual(F, x, t, t - 0.009, v, net.on_schedule(Flow()), None), F - v)
        assert not torch.equal(method.residual(F, x, t, t - 0.011, v, net.on_schedule(Flow()), None), F - v)

    def test_thirds(self):
        """(1, 0); r in [.95 t, t]; r in [0, t]."""
        nets, said = nets_of(), []
        nets.student.denoiser.call = lambda net, x, t, c: (said.append((t / 1000, c["end"])), x)[1]
        RCGM(target_ema=0).student_loss(draw_of(300).normal("real", (300, 2)), nets, {}, draw_of(300))
        (t, r), third = said[0], torch.arange(300) % 3
        assert torch.equal(t[third == 0], torch.ones(100).double()) and bool((r[third == 0] == 0).all())
        near, any_ = (r / t)[third == 1], (r / t)[third == 2]
        assert 0.95 <= near.min() < 0.955 and 0.995 < near.max() <= 1
        assert any_.min() < 0.05 and any_.max() > 0.95

    @pytest.mark.parametrize("barron", (True, False))
    def test_by_hand(self, barron):
        """Loss and gradient of a whole turn; the target is the average, and says nothing of a gradient."""
        nets, draw = nets_of(), draw_of()
        real, eps = draw.normal("real", (N, 2)), draw.normal("eps", (N, 2))
        u, share = draw.uniform("t", (N,)).double(), draw.uniform("r", (N,)).double()
        third = torch.arange(N) % 3
        t = torch.where(third == 0, 1.0, u)
        r = torch.where(third == 0, 0.0, t * torch.where(third == 1, 1 - 0.05 * share, share))
        col = lambda a: a[:, None]
        x_t = (1 - col(t)) * real + col(t) * eps
        of = lambda net, x, a, b: average(net.on_schedule(Flow()), x, a.clamp(min=0), b.clamp(min=0), None)
        F, v, d = of(nets.student.denoiser, x_t, t, r), eps - real, 0.01
        mid, start = (t - d + r) / 2, x_t - d * v
        one = of(nets.target, start, t - d, mid) * col(t - d - mid)
        two = of(nets.target, start - one, mid, r) * col(mid - r)
        g = torch.where(col(t - r <= d), F - v, (col(t - r) * F - one - two) / d - v).detach()
        g = g.clamp(-0.7, 0.7)
        e = g.square().mean(1)
        w = 1 + ((1 - (t - r)) * math.pi / 2.5).tan()
        assert w.min() >= 1 and w.max() < 4.08
        method = RCGM(clamp=0.7, c=1e-3 if barron else None)
        loss = method.student_loss(real, nets, {}, draw)[0]
        scale = (e + 1e-6).sqrt() if barron else torch.ones(N).double()
        torch.testing.assert_close(loss.detach(), (w * e / scale).mean(), rtol=1e-10, atol=0)
        want = gradient((w * (2 * g * F).mean(1) / scale).mean(), nets.student.denoiser.net)
        for got, right in zip(gradient(loss, nets.student.denoiser.net), want, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-8, atol=1e-10)

    def test_self_guidance(self):
        """v + kappa (F'(c) - F'(null)) at (t, t) of the target, but not at the ends of the interval."""
        nets, draw = nets_of(classes=3), draw_of()
        real, c = draw.normal("real", (N, 2)), {"label": torch.arange(N) % 3}
        method = RCGM(kappa=0.8, **FREE)
        assert method.requirements == (
            Requirement.REAL,
            Requirement.END_TIME,
            Requirement.NULL_CONDITION,
        )
        assert RCGM().requirements == (Requirement.REAL, Requirement.END_TIME)
        seen = []
        spy = type("Spy", (RCGM,), {"residual": lambda self, F, x, t, r, v, net, c: (seen.append((x, t, v)), F - v)[1]})
        loss = spy(**asdict(method) | {"times": method.times}).student_loss(real, nets, {"real_c": c}, draw)[0]
        (x, t, v), eps = seen[0], draw.normal("eps", (N, 2))
        of = lambda c: average(nets.target.on_schedule(Flow()), x, t, t, c)
        gap = of(c) - of({"label": torch.full((N,), 3)})
        gap = gap * ((t > 0) & (t < 1))[:, None]  # at t = 1 samples are unguided
        torch.testing.assert_close(v, eps - real + 0.8 * gap, rtol=1e-12, atol=1e-12)
        assert loss.requires_grad and gap.norm() > 0.1

    def test_target_follows(self):
        nets = nets_of()
        want = [0.9 * a + 0.1 * b for a, b in zip(nets.target.net.parameters(), nets.student.denoiser.net.parameters())]
        RCGM(target_ema=0.9).after_student_step(nets)
        for got, right in zip(nets.target.net.parameters(), want):
            torch.testing.assert_close(got, right)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_off_is_the_base(schedule):
    """Loss and gradient to the bit; each of its terms on, it is another."""
    nets, draw = nets_of(schedule), draw_of()
    batch = {"real": draw.normal("real", (N, 2))}

    def turn(method):
        loss, _ = method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)
        return loss.detach(), gradient(loss, nets.student.denoiser.net)

    want, off = turn(RCGM()), turn(TwinFlow(twin=0, rectify=0))
    assert torch.equal(off[0], want[0]) and all(torch.equal(a, b) for a, b in zip(off[1], want[1], strict=True))
    for change in ({"twin": 0.0}, {"rectify": 0.0}):
        assert not torch.equal(turn(replace(TwinFlow(), **change))[0], want[0])
    assert {f.name for f in fields(RCGM)} < {f.name for f in fields(TwinFlow)} and TwinFlow().roles == ("target",)


def twin(schedule, kind="v", n=128):
    """One network: data N(mu, Sigma), samples A z + b under no end, their velocity under a negative one; whitened."""
    (law, line), path = problem(2), SCHEDULES[schedule]
    net = Denoiser(Average(law, path, kind, line), path, kind)
    first = float(path.time(torch.tensor(4.0, dtype=F64)))
    nets = Nets(exact(law, path, kind), Student(net, (first,)), (2,), target=exact(law, path, kind))
    draw = Whitened(n, 2, ("z", "eps_twin", "eps_rectify", "eps", "real"))
    return law, line, nets, draw


class Quiet(TwinFlow):
    """Its own two terms alone."""

    def residual(self, F, *rest):
        return torch.zeros_like(F)


def terms(schedule, t, kind="v", **change):
    law, line, nets, draw = twin(schedule, kind)
    method, batch = Quiet(**FREE | {"times": Fixed(t), "target_ema": 0.0} | change), {"real": draw.columns["real"]}
    nets.target = None
    loss, logs = method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)
    return law, line, nets.student.denoiser.net, logs


@pytest.mark.level(1, "TwinFlow")
@pytest.mark.parametrize("schedule, kind", PAIRS)
@pytest.mark.parametrize("t", (0.3, 0.7))
def test_rectify_descends_the_kl(schedule, kind, t):
    """d/dx mean|x - sg(x + g)|^2 = -2 g / n and g = s^2 (score_data - score_samples) / t, with s = t / (1 - t)."""
    law, line, _, logs = terms(schedule, t, kind)
    s, found = t / (1 - t), torch.autograd.grad(logs["rectify"], (line.A, line.b))
    for got, want in zip(found, kl_gradient(law, line.A.detach(), line.b.detach(), s)):
        want = 2 / 2 / t * s**2 * want
        assert (got - want).norm() < 1e-9 * want.norm()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twin_learns_the_samples(schedule):
    """The velocity of the student's samples is its optimum, under the negative sign, and no gradient reaches x."""
    _, line, net, logs = terms(schedule, 0.6)
    found = torch.autograd.grad(logs["twin"], (net.A, net.b, line.A), allow_unused=True)
    assert found[2] is None and max(float(g.abs().max()) for g in found[:2]) < 1e-10
    _, _, nets, _ = twin(schedule)
    nets.student.denoiser.net.b.data += 0.1
    draw = twin(schedule)[3]
    method, nets.target = Quiet(**FREE | {"times": Fixed(0.6), "target_ema": 0.0}), None
    batch = {"real": draw.columns["real"]}
    logs = method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)[1]
    (b,) = torch.autograd.grad(logs["twin"], nets.student.denoiser.net.b)
    torch.testing.assert_close(b, torch.full((2,), 0.1, dtype=F64), rtol=1e-8, atol=1e-8)


def test_where_samples_are_data_nothing_is_rectified():
    law, line, nets, draw = twin("flow")
    line.A.data, line.b.data = law.axes @ law.var.sqrt().diag(), law.mean.clone()
    method, batch = TwinFlow(**FREE | {"times": Fixed(0.6)}), {"real": draw.columns["real"]}
    nets.target = nets.student.denoiser
    logs = method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)[1]
    assert logs["gap"] < 1e-20 < terms("flow", 0.6)[3]["gap"]


def test_clamp_and_barron():
    """g is clamped in L_rect, not in L_twin; both are Barron's."""
    _, line, _, logs = terms("flow", 0.6, clamp=0.05, c=1e-3)
    e = adaptive(torch.tensor(0.05**2, dtype=F64), 0.5, 1e-6)
    assert 0.5 * e < logs["rectify"] <= e and logs["twin"] > 2 * e
    torch.testing.assert_close(adaptive(torch.tensor([3.0]), 0.0, 1.0), torch.tensor([3.0]))
    size = torch.tensor([4.0], requires_grad=True)
    adaptive(size, 1.0, 0.0).backward()
    assert float(size.grad) == 0.25


def test_sum_of_terms():
    nets, draw, batch = nets_of(), draw_of(), {"real": draw_of().normal("real", (N, 2))}
    method = TwinFlow(twin=0.3, rectify=0.7)
    loss, logs = method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)
    torch.testing.assert_close(loss, logs["base"] + 0.3 * logs["twin"] + 0.7 * logs["rectify"])


def test_trains():
    """Through train(): the second time moves, and the target after it."""
    method = TwinFlow()
    nets = build(method, clock(Flow(), "flow", dtype=torch.float32), (2,))
    data = lambda draw: {"real": 0.3 * draw.normal("real", (len(draw.samples), 2)) + 1}
    cfg = TrainConfig(max_train_steps=5, train_batch_size=12, learning_rate=5e-3)
    for state in train(method, nets, data, cfg, Accelerator(cpu=True)):
        assert all(torch.isfinite(value) for value in state.logs.values())
    first, second = (n.net.end.linear_2.weight.norm() for n in (nets.student.denoiser, nets.target))
    assert 0 < second < 0.1 * first


def test_line_is_what_generates():
    _, line, nets, draw = twin("edm")
    x = TwinFlow().sample(nets, {}, draw)
    torch.testing.assert_close(x, line(draw.columns["z"], None))
    assert isinstance(line, Line)
