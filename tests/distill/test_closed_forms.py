"""Expected gradients of the methods against closed forms, in float64, and exact consistency functions.

The teacher is N(mu, Sigma), the generator x = A z + b, the fake the optimal denoiser of the generator. The losses are
quadratic in (z, eps), so jointly whitened draws give expectations without error (gaussian.Whitened).
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from gaussian import (
    F64,
    RATIOS,
    SCHEDULES,
    Gaussian,
    Line,
    Oracle,
    Whitened,
    consistent,
    exact,
    fisher,
    gains,
    kl,
    kl_gradient,
    nets_of,
    problem,
    sid_gradient,
    sid_loss,
    student_gradient,
)

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import EDM, KINDS, Trig
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed, TimeDistribution
from distill.methods import DMD2, LCD, SCM, VSD, SiD, scm
from distill.random import Draw
from distill.roles import Nets

ALPHAS = (0.0, 0.5, 1.0, 1.2)
METHODS = {
    "dmd2": DMD2(gan=0, gan_fake=0, normalise=False, reduction="sum"),
    "vsd": VSD(guidance=1.0, reduction="sum"),
    "vsd-unweighted": VSD(guidance=1.0, reduction="sum", weight=False),
    **{f"sid-{a}": SiD(alpha=a, gain=1.0, normalise=False, reduction="sum") for a in ALPHAS},
}


def near(got, want, rtol=1e-10):
    """Relative in the norm of the whole tensor."""
    assert (got - want).norm() <= rtol * want.norm(), f"off by {(got - want).norm() / want.norm():.3g}"


def at(method, t):
    return replace(method, times=Fixed(float(t)), fake_times=Fixed(float(t)))


def expected(name, teacher, line, alpha, sigma):
    """The table's (dA, db). A schedule enters by s = sigma / alpha, a method by its weight on the score."""
    s, A, b = sigma / alpha, line.A.detach(), line.b.detach()
    if name.startswith("sid"):
        return sid_gradient(teacher, A, b, s, float(name[4:]))
    # KL's gradient to x is score_fake - score_real = (x0_fake - x0_real) / s^2 = (eps_real - eps_fake) / s
    weight = {"dmd2": s**2, "vsd": s * sigma**2 / (alpha**2 + sigma**2), "vsd-unweighted": s}[name]
    return tuple(weight * g for g in kl_gradient(teacher, A, b, s))


def autograd(f, line):
    A, b = line.A.detach().requires_grad_(), line.b.detach().requires_grad_()
    return torch.autograd.grad(f(A, b), (A, b))


class TestTable:
    """The closed forms among themselves: each entry of the table is the derivative of a loss that is written as one."""

    @pytest.mark.parametrize("d", (2, 16))
    @pytest.mark.parametrize("s", RATIOS)
    def test_kl(self, d, s):
        teacher, line = problem(d)
        for got, want in zip(
            kl_gradient(teacher, line.A, line.b, s), autograd(lambda A, b: kl(teacher, A, b, s), line)
        ):
            near(got, want, 1e-12)

    @pytest.mark.parametrize("d", (2, 16))
    @pytest.mark.parametrize("s", RATIOS)
    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_sid(self, d, s, alpha):
        teacher, line = problem(d)
        Kq, b_fake = gains(teacher, line.A.detach(), s)[3], line.b.detach()
        dA, db = autograd(lambda A, b: sid_loss(teacher, A, b, s, alpha, Kq, b_fake), line)
        got = sid_gradient(teacher, line.A.detach(), line.b.detach(), s, alpha)
        near(got[0], dA, 1e-12)
        near(got[1], db, 1e-12)


@pytest.mark.level(1, "DMD2", "VSD", "SiD")
@pytest.mark.parametrize("d", (2, 16))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", METHODS)
def test_student_gradient(name, schedule, d):
    """DMD2 and VSD give the KL's gradient, SiD the table's, at three levels of noise and for every kind of network."""
    (teacher, line), path = problem(d), SCHEDULES[schedule]
    draw = Whitened(256, d)
    for t in path.time(torch.tensor(RATIOS, dtype=F64)):
        want = expected(name, teacher, line, *path.coefficients(t))
        for kind in KINDS:
            nets = nets_of(line, exact(teacher, path, kind), fake=exact(line.law, path, kind))
            _, *got = student_gradient(at(METHODS[name], t), nets, draw)
            near(got[0], want[0])
            near(got[1], want[1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_where_student_is_teacher(name, schedule):
    teacher, path = problem(2)[0], SCHEDULES[schedule]
    line = Line(teacher.axes @ teacher.var.sqrt().diag(), teacher.mean)
    nets = nets_of(line, exact(teacher, path, "v"), fake=exact(line.law, path, "v"))
    for t in path.time(torch.tensor(RATIOS, dtype=F64)):
        _, dA, db = student_gradient(at(METHODS[name], t), nets, Whitened(256, 2))
        assert dA.norm() < 1e-12 and db.norm() < 1e-12


@pytest.mark.parametrize("d", (2, 16))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sid_at_one_half_is_half_the_fisher_gradient(schedule, d):
    """... of E|real - fake|^2 with the fake moving along with the student; at alpha = 1 and 1.2 it is far from it."""
    (teacher, line), path = problem(d), SCHEDULES[schedule]
    nets = nets_of(line, exact(teacher, path), fake=exact(line.law, path))
    for t in path.time(torch.tensor(RATIOS, dtype=F64)):
        s = float(path.ratio(t))
        want = autograd(lambda A, b, s=s: fisher(teacher, A, b, s) / 2, line)
        for alpha in (0.5, 1.0, 1.2):
            _, *got = student_gradient(at(METHODS[f"sid-{alpha}"], t), nets, Whitened(256, d))
            if alpha == 0.5:
                near(got[0], want[0])
                near(got[1], want[1])
            else:
                assert (got[0] - want[0]).norm() > 0.01 * want[0].norm()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("alpha", (1.0, 1.1, 1.2, 2.0))
def test_sid_widens_a_student_that_is_far_too_wide(alpha, schedule):
    """In one dimension the variance's gradient changes sign at (S + s^2) / (Sigma + s^2) = alpha / (alpha - 1)."""
    path, s, teacher = SCHEDULES[schedule], 0.5, Gaussian(torch.zeros(1, dtype=F64), torch.eye(1, dtype=F64))
    method = at(SiD(alpha=alpha, gain=1.0, normalise=False), path.time(torch.tensor(s, dtype=F64)))

    def slope(ratio):
        """Gradient to A of a student whose noisy variance is `ratio` times the teacher's."""
        line = Line(torch.full((1, 1), ratio * (1 + s**2) - s**2, dtype=F64).sqrt(), teacher.mean)
        nets = nets_of(line, exact(teacher, path), fake=exact(line.law, path))
        return float(student_gradient(method, nets, Whitened(16, 1))[1])

    assert slope(0.9) < 0 < slope(1.1)  # towards the teacher from both sides ...
    if alpha == 1:
        assert slope(1000.0) > 0
    else:
        turn = alpha / (alpha - 1)
        assert slope(0.999 * turn) > 0 > slope(1.001 * turn)  # ... and away from it beyond the turn
        assert abs(slope(turn)) < 1e-10


class Affine(torch.nn.Module):
    """The linear denoiser x0 = K x_t + k, to be fitted."""

    def __init__(self, K, k):
        super().__init__()
        self.K, self.k = torch.nn.Parameter(K.clone()), torch.nn.Parameter(k.clone())

    def forward(self, x, t):
        return x @ self.K.T + self.k


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ("dmd2", "vsd", "sid-1.0"))
def test_fake_loss_is_least_at_the_posterior_mean(name, schedule):
    """The fake's gradient vanishes at E[x | x_t] of the generator's samples, and is 2 (gap) E[x_t x_t^T] beside it."""
    (teacher, line), path, draw = problem(2), SCHEDULES[schedule], Whitened(256, 2)
    t = path.time(torch.tensor(1.0, dtype=F64))
    alpha, sigma = path.coefficients(t)
    K = gains(teacher, line.A.detach(), float(sigma / alpha))[3] / alpha
    k = line.b.detach() - alpha * K @ line.b.detach()
    nets = nets_of(line, exact(teacher, path), fake=Denoiser(Affine(K, k), path, "x0"))
    method, params = at(METHODS[name], t), (nets.fake.net.K, nets.fake.net.k)
    with torch.no_grad():
        x = method.sample(nets, {}, draw)
    dK, dk = torch.autograd.grad(method.fake_loss(x, nets, {}, draw)[0], params)
    assert dK.norm() < 1e-12 and dk.norm() < 1e-12
    with torch.no_grad():
        nets.fake.net.k += 0.1
    dK, dk = torch.autograd.grad(method.fake_loss(x, nets, {}, draw)[0], params)
    near(dk, torch.full((2,), 0.2, dtype=F64))


@dataclass(frozen=True)
class Levels(TimeDistribution):
    """Every time of a list for an equal block of the batch."""

    t: tuple

    def __call__(self, draw, name, B, schedule):
        return torch.tensor(self.t, dtype=F64).repeat_interleave(B // len(self.t))


class TestTraining:
    """Gradient descent on the expected loss, the mean over 12 levels of noise, the fake optimal at every step."""

    STEPS, N = 300, 8

    def train(self, method, teacher, line, rate):
        path = EDM()
        t = path.time(torch.tensor(np.geomspace(0.05, 3.0, 12)))
        method = replace(method, times=Levels(tuple(t.tolist())))
        draw, start = Whitened(self.N, 2, blocks=12), exact(teacher, path)
        for _ in range(self.STEPS):
            _, dA, db = student_gradient(method, nets_of(line, start, fake=exact(line.law, path)), draw)
            with torch.no_grad():
                line.A -= rate * dA
                line.b -= rate * db
        return float(kl(teacher, line.A.detach(), line.b.detach()))

    @pytest.mark.parametrize("width", (0.3, 3.0), ids=("narrow", "wide"))
    @pytest.mark.parametrize("name", ("dmd2", "vsd-unweighted", "sid-0.5", "sid-1.0", "sid-1.2"))
    def test_reaches_the_teacher(self, name, width):
        teacher = problem(2)[0]
        line = Line(width * torch.eye(2, dtype=F64), teacher.mean + 0.5)
        before = float(kl(teacher, line.A.detach(), line.b.detach()))
        after = self.train(METHODS[name], teacher, line, rate=0.2)
        assert before > 0.5 and after < 1e-6, f"KL {before:.3g} -> {after:.3g}"


class Aware(Oracle):
    """A fake score that knows the sample it looks at, or, where `known` is 0, only the distribution of samples."""

    def __init__(self, law, schedule, kind):
        super().__init__(None, schedule, kind)
        self.law = law

    def forward(self, x, native, sample, known):
        self.predict = lambda *at: torch.where(known[:, None] > 0, sample, self.law.denoise(*at))
        return super().forward(x, native)


class TestEntropic:
    """Entropic distillation (ESD): VSD whose fake score is conditional on the sample, guided by 1 - lambda.

    In one dimension the student's stationary variance is max(0, lambda v - (1 - lambda) sigma^2 / alpha^2).
    """

    V, S = 1.0, 0.5  # variance of the data; sigma / alpha

    def gradient(self, lam, path, line):
        teacher = Gaussian(torch.full((1,), 2.0, dtype=F64), torch.full((1, 1), self.V, dtype=F64))
        alone = lambda net, x, t, c: net(x, t)  # teacher and student don't know the sample
        fake = Denoiser(Aware(line.law, path, "eps"), path, "eps")
        fake.null = {"sample": torch.zeros(1, 1, dtype=F64), "known": torch.zeros(1, dtype=F64)}
        nets = nets_of(line, replace(exact(teacher, path, "eps"), call=alone), fake=fake)
        nets.student.denoiser.call = alone
        method = at(METHODS["vsd-unweighted"], path.time(torch.tensor(self.S, dtype=F64)))
        method, draw = replace(method, fake_guidance=1 - lam), Whitened(16, 1)
        x = method.sample(nets, {}, draw)
        batch = {"c": {"sample": x.detach(), "known": torch.ones(len(x), dtype=F64)}}
        return torch.autograd.grad(method.student_loss(x, nets, batch, draw)[0], (line.A, line.b))

    def line(self, variance, mean=2.0):
        return Line(torch.full((1, 1), variance, dtype=F64).sqrt(), torch.full((1,), mean, dtype=F64))

    @pytest.mark.parametrize(
        "lam, variance", ((0.0, 0.0), (0.25, 0.0625), (0.5, 0.375), (0.75, 0.6875), (1.0, 1.0), (1.25, 1.3125))
    )
    def test_descent_reaches_the_stationary_variance(self, lam, variance):
        assert variance == max(0.0, lam * self.V - (1 - lam) * self.S**2)  # the numbers of the sheet
        line = self.line(0.64, mean=0.0)
        for _ in range(400):
            dA, db = self.gradient(lam, EDM(), line)
            with torch.no_grad():
                line.A -= 0.4 * dA
                line.b -= 0.4 * db
        assert abs(float(line.A.detach()) ** 2 - variance) < 1e-8
        assert abs(float(line.b.detach()) - 2.0) < 1e-8

    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize("lam", (0.25, 0.5, 0.75, 1.0, 1.25))
    def test_stationary_on_every_schedule(self, lam, schedule):
        path, variance = SCHEDULES[schedule], lam * self.V - (1 - lam) * self.S**2
        slope = lambda factor: float(self.gradient(lam, path, self.line(factor * variance))[0])
        assert abs(slope(1.0)) < 1e-12
        assert slope(0.99) < 0 < slope(1.01)


class Spread(Whitened):
    """Whitened images and noise for each of `blocks` equal parts of the uniform draws in [low, high)."""

    def __init__(self, blocks, low=0.0, high=1.0, n=8):
        super().__init__(n, 2, ("real", "eps"), blocks)
        self.low, self.high = low, high

    def uniform(self, name, shape):
        return self.low + (self.high - self.low) * (torch.arange(shape[0], dtype=F64) + 0.5) / shape[0]


class Plain(Draw):
    """Ordinary draws, in float64."""

    def __init__(self, n):
        super().__init__(0, 0, "student", torch.arange(n))

    def normal(self, name, shape):
        return super().normal(name, shape).double()


def consistency_nets(path, kind, student=None):
    law = problem(2)[0]
    return law, Nets(exact(law, path, kind), Student(student or consistent(law, path, kind)), (2,))


def fits(schedule, kind):
    """A network that predicts noise says nothing at alpha = 0."""
    return kind != "eps" or schedule in ("vp", "edm")


PAIRS = [(schedule, kind) for schedule in SCHEDULES for kind in KINDS if fits(schedule, kind)]


@pytest.mark.level(1, "LCD")
@pytest.mark.parametrize("schedule, kind", PAIRS)
class TestDiscreteConsistency:
    """LCD at the exact consistency function of a Gaussian; the residual is what its loss reports as delta."""

    def residual(self, schedule, kind, solver, N=50, low=0.0, high=1.0, **change):
        law, nets = consistency_nets(SCHEDULES[schedule], kind, **change)
        method = LCD(N=N, solver=law.step if solver == "exact" else solver, target_ema=0, huber_c=None)
        draw = Spread(round(N * (high - low)), low, high)
        loss, logs = method.student_loss(draw.columns["real"], nets, {}, draw)
        assert float(loss.detach()) == float(logs["delta"])
        return float(logs["delta"]) ** 0.5

    def test_vanishes_with_the_exact_step(self, schedule, kind):
        assert self.residual(schedule, kind, "exact") < 1e-13

    def test_does_not_vanish_elsewhere(self, schedule, kind):
        """The teacher's one-step prediction is consistent with nothing."""
        teacher = exact(problem(2)[0], SCHEDULES[schedule], kind)
        assert self.residual(schedule, kind, "exact", student=teacher) > 1e-3

    @pytest.mark.parametrize("solver, order", (("ddim", 2), ("heun", 3)))
    def test_falls_with_the_order_of_the_solver(self, schedule, kind, solver, order):
        """The error of one step is h^2 for DDIM, h^3 for Heun.

        Over t in [0.2, 0.8]: VP's sigma^2 is linear in t near 0; where sigma or alpha is 0 Heun's step is Euler's.
        """
        N = (80, 160, 320)
        residual = [self.residual(schedule, kind, solver, n, 0.2, 0.8) for n in N]
        slope = -np.polyfit(np.log(N), np.log(residual), 1)[0]
        assert slope == pytest.approx(order, abs=0.1)


@pytest.mark.level(1, "SCM")
@pytest.mark.parametrize("schedule, kind", PAIRS)
class TestContinuousConsistency:
    """sCM's tangent, cos(t) df/dt along the teacher's trajectory, at the exact consistency function of a Gaussian."""

    def tangent(self, schedule, kind, times=None, **change):
        law, nets = consistency_nets(SCHEDULES[schedule], kind, **change)
        method = SCM(warmup=0, normalise=False)
        method = replace(method, times=times) if times else method
        real = torch.randn(256, 2, dtype=F64)
        return float(method.student_loss(real, nets, {}, Plain(len(real)))[1]["tangent"])

    def test_vanishes(self, schedule, kind):
        assert self.tangent(schedule, kind) < 1e-13

    @pytest.mark.parametrize("end", (0.0, 1.0))
    def test_vanishes_at_the_ends(self, schedule, kind, end):
        """Also where rounding may put a time outside the schedule (times beyond it are clamped to its ends)."""
        if end or schedule in ("vp", "edm"):  # elsewhere sigma = 0, where nothing is learnt
            assert self.tangent(schedule, kind, Fixed(end)) < 1e-12

    def test_needs_the_sign_of_the_derivative(self, schedule, kind, monkeypatch):
        right = scm.jvp
        monkeypatch.setattr(scm, "jvp", lambda *a: tuple(sign * y for sign, y in zip((1, -1), right(*a))))
        assert self.tangent(schedule, kind) > 0.1

    def test_does_not_vanish_elsewhere(self, schedule, kind):
        assert self.tangent(schedule, kind, student=exact(problem(2)[0], SCHEDULES[schedule], kind)) > 0.1


def test_trigflow_consistency_of_data_as_wide_as_sigma_d():
    """There the teacher's velocity is 0 and the student's F is -x tan(theta / 2) / sigma_d."""
    law, path = Gaussian(torch.zeros(2, dtype=F64), 0.25 * torch.eye(2, dtype=F64)), Trig(0.5)
    x, t = torch.randn(64, 2, dtype=F64), torch.linspace(0.05, 0.95, 64, dtype=F64)
    theta = (t * math.pi / 2)[:, None]
    assert SCM().velocity(exact(law, path)(x, t), t).abs().max() < 1e-13
    f = SCM().velocity(consistent(law, path)(x, t), t) / 0.5
    torch.testing.assert_close(f, -x * (theta / 2).tan() / 0.5, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_score_difference_of_unequal_means(schedule):
    """E[fake - real] = (m_student - m) sigma^2 / (alpha^2 v + sigma^2) where both have variance v."""
    path, v = SCHEDULES[schedule], 0.49
    teacher, line = (
        Gaussian(torch.ones(1, dtype=F64), v * torch.eye(1, dtype=F64)),
        Line(v**0.5 * torch.eye(1, dtype=F64), torch.full((1,), 3.0, dtype=F64)),
    )
    nets = nets_of(line, exact(teacher, path), fake=exact(line.law, path))
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = (float(a) for a in path.coefficients(torch.tensor(t, dtype=F64)))
        _, _, db = student_gradient(at(METHODS["dmd2"], t), nets, Whitened(16, 1))
        assert float(db) == pytest.approx(2.0 * sigma**2 / (alpha**2 * v + sigma**2), rel=1e-10)
