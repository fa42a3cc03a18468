"""f-distill: h is f'' of the divergence, and with the true ratio its gradient is that divergence's, by quadrature."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gaussian import F64, RATIOS, SCHEDULES, Gaussian, Line, Oracle, nets_of
from tiny import tiny
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import EDM
from distill.diffusion.times import Fixed, Uniform
from distill.methods import DMD2, FDistill
from distill.methods.f_distill import H
from distill.random import Draw
from distill.training.build import build

F = {
    "reverse-kl": lambda r: -r.log(),
    "forward-kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "softened-kl": lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
    "hellinger": lambda r: (1 - r.sqrt()) ** 2,
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
}


def second(f, r):
    """f''(r)."""
    r = r.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    return torch.autograd.grad(slope.sum(), r)[0]


@pytest.mark.parametrize("name", H)
def test_h_is_the_curvature_of_f(name):
    r, one = torch.logspace(-2, 2, 41, dtype=F64), torch.ones(1, dtype=F64)
    assert abs(float(F[name](one))) < 1e-15  # D_f of equals is 0
    torch.testing.assert_close(H[name](r), r**2 * second(F[name], r) / second(F[name], one), rtol=1e-9, atol=0)


class Shown(Oracle):
    """An exact denoiser whose module `eye` shows what it is given."""

    def __init__(self, *what):
        super().__init__(*what)
        self.eye = nn.Identity()

    def forward(self, x, native):
        return super().forward(self.eye(x), native)


class Ratio(nn.Module):
    """The optimal discriminator: log p_t(x_t) - log q_t(x_t) of two Gaussians on the line."""

    def __init__(self, p, q, alpha, sigma):
        super().__init__()
        self.laws = [
            torch.distributions.Normal(alpha * law.mean, (alpha**2 * law.var + sigma**2).sqrt()) for law in (p, q)
        ]

    def forward(self, x_t):
        p, q = (law.log_prob(x_t) for law in self.laws)
        return p - q


def quadrature(method, line, teacher, path, t, n=64):
    """Gradient to (A, b), over the nodes of Gauss and Hermite for z and eps."""
    node, weight = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(n))
    z, eps = (a.reshape(-1, 1) for a in torch.meshgrid(node, node, indexing="ij"))
    w = torch.outer(weight, weight).reshape(-1, 1) / (2 * math.pi)

    class Nodes(Draw):
        def normal(self, name, shape):
            return {"z": z, "eps": eps}[name]

    fake = Denoiser(Shown(line.law.denoise, path, "v"), path, "v")
    nets = nets_of(line, Denoiser(Oracle(teacher.denoise, path, "v"), path, "v"), fake=fake)
    nets.disc = Ratio(teacher, line.law, *path.coefficients(t))
    method = replace(method, times=Fixed(float(t)), taps=("eye",))
    x = line(z, None).detach().requires_grad_()
    loss, logs = method.student_loss(x, nets, {}, Nodes(0, 0, "student", torch.arange(len(z))))
    g = torch.autograd.grad(loss, x)[0] * len(z)  # the loss is a sum over elements / batch
    return float((w * g * z).sum()), float((w * g).sum()), logs


def divergence(name, teacher, line, s):
    """Gradient to (A, b) of D_f / f''(1) between the laws at level s, integrated on a fine grid."""
    A, b = line.A.detach().requires_grad_(), line.b.detach().requires_grad_()
    y = torch.linspace(-60, 60, 60001, dtype=F64)[:, None]
    p = torch.distributions.Normal(teacher.mean, (teacher.var + s**2).sqrt()).log_prob(y)
    q = torch.distributions.Normal(b, (A[0] ** 2 + s**2).sqrt()).log_prob(y)
    inside = (q > -300).detach()  # beyond, both are 0
    p, q = p[inside], q[inside]
    value = (q.exp() * F[name]((p - q).exp())).sum() * (120 / 60000)
    return [float(g) / float(second(F[name], torch.ones(1, dtype=F64))) for g in torch.autograd.grad(value, (A, b))]


@pytest.mark.level(1, "FDistill")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", H)
def test_gradient_is_the_divergences(name, schedule):
    """... to the samples at level t, times s^2, as for DMD2 and the reverse KL."""
    teacher = Gaussian(torch.tensor([0.3], dtype=F64), torch.ones(1, 1, dtype=F64))
    line, path = Line(torch.full((1, 1), 0.9, dtype=F64), torch.zeros(1, dtype=F64)), SCHEDULES[schedule]
    method = FDistill(gan=0, divergence=name, low=1e-30, high=1e30, normalise=False, reduction="sum", ratio_bins=0)
    for t in path.time(torch.tensor(RATIOS, dtype=F64)):
        s = float(path.ratio(t))
        *got, _ = quadrature(method, line, teacher, path, t)
        want = divergence(name, teacher, line, s)
        assert got == pytest.approx([s**2 * g for g in want], rel=1e-6), (name, schedule, s)


LEVELS = {"times": Fixed(0.5), "fake_times": Fixed(0.5), "gan_times": Fixed(0.5)}


def nets_like(method, schedule="edm"):
    torch.manual_seed(0)
    kind = "edm" if schedule == "edm" else "v"
    nets = build(method, tiny(SCHEDULES[schedule], kind, dtype=torch.float32), (2,))
    for p in nets.fake.net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return nets


def turns(method, nets):
    """Losses, gradients to what moves, and logs of both turns."""
    found = []
    for player, moved in (("student", nets.student.denoiser.net), ("fake", nn.ModuleList((nets.fake.net, nets.disc)))):
        draw = Draw(0, 1, player, torch.arange(8))
        batch = {"real": draw.normal("real", (8, 2))}
        x = method.sample(nets, batch, draw)
        loss, logs = getattr(method, f"{player}_loss")(x if player == "student" else x.detach(), nets, batch, draw)
        found.append(([loss, *torch.autograd.grad(loss, moved.parameters(), allow_unused=True)], logs))
    return found


def same(a, b):
    return (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "off", ({"divergence": "reverse-kl"}, {"divergence": "forward-kl", "low": 1.0, "high": 1.0, "ratio_bins": 0})
)
def test_switched_off_it_is_dmd2(off, schedule):
    """Bit for bit, in both turns: the reverse KL, or any other of equal densities."""
    method, base = FDistill(taps=("mid",), gan=0.1, **{"divergence": "reverse-kl"} | off), DMD2(taps=("mid",), gan=0.1)
    nets = nets_like(base, schedule)
    for (ours, logs), (theirs, others) in zip(turns(method, nets), turns(base, nets)):
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
        assert all(torch.equal(logs[name], others[name]) for name in others)


def test_switched_on_it_weighs_each_sample():
    """g is h(r) of DMD2's, with r of its own x_t; the heads of several taps agree on one r."""
    method = FDistill(taps=("first", "mid"), gan=0.0, divergence="forward-kl", reduction="sum", ratio_bins=0, **LEVELS)
    nets, draw = nets_like(method), Draw(0, 1, "student", torch.arange(8))
    x = method.sample(nets, {}, draw).detach().requires_grad_()
    grad = lambda m: torch.autograd.grad(m.student_loss(x, nets, {}, draw)[0], x)[0]
    t, x_t = (
        torch.full((8,), 0.5, dtype=F64),
        EDM().diffuse(x.detach(), draw.normal("eps", (8, 2)), torch.full((8,), 0.5)),
    )
    r = nets.disc(*nets.fake.features(x_t, t, None, ("first", "mid"))).mean(1, keepdim=True).exp()
    assert (r.log().abs() > 0.01).all() and r.std() > 1e-3
    torch.testing.assert_close(grad(method), r * grad(replace(method, divergence="reverse-kl")), rtol=1e-4, atol=1e-7)
    logs = method.student_loss(x, nets, {}, draw)[1]
    assert float(logs["ratio"]) == pytest.approx(float(r.detach().mean()), rel=1e-5)
    assert float(logs["h_low"]) < float(logs["h"]) < float(logs["h_high"])


@pytest.mark.parametrize("schedule", ("vp", "edm"))
def test_a_ratio_is_divided_by_its_mean_in_a_bin(schedule):
    """... of native t, before h; unit_mean divides h by its mean after. 32 samples: most share their bin."""
    n, path = 32, SCHEDULES[schedule]
    method = FDistill(taps=("mid",), gan=0.0, divergence="neyman", reduction="sum", times=Uniform(0.0, 1.0))
    nets, draw = nets_like(method, schedule), Draw(0, 1, "student", torch.arange(n))
    x = method.sample(nets, {}, draw).detach().requires_grad_()
    grad = lambda m: torch.autograd.grad(m.student_loss(x, nets, {}, draw)[0], x)[0]
    t = draw.uniform("t", (n,)).double()
    x_t = path.diffuse(x.detach(), draw.normal("eps", (n, 2)), t)
    r = nets.disc(*nets.fake.features(x_t, t, None, ("mid",))).mean(1).exp().double()
    native = [float(path.native(t[i : i + 1])) for i in range(n)]
    low, high = (float(path.native(torch.tensor([end], dtype=F64))) for end in (0.0, 1.0))
    bins = [min(9, math.floor(10 * (one - low) / (high - low))) for one in native]
    assert 3 < len(set(bins)) < n / 2
    mean = torch.stack([torch.stack([r[j] for j in range(n) if bins[j] == bins[i]]).mean() for i in range(n)])
    base, h = grad(replace(method, divergence="reverse-kl")), mean / r
    torch.testing.assert_close(grad(method), (h[:, None] * base).float(), rtol=1e-4, atol=1e-7)
    want = (h / h.mean())[:, None] * base
    torch.testing.assert_close(grad(replace(method, unit_mean=True)), want.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("features", ("fake", "teacher"))
def test_the_gan_at_the_noise_of_the_scores(features):
    """FastGen's: l(x) of both losses is read at x_t of the scores; the frozen teacher's features train heads alone."""
    how = {"taps": ("mid",), "gan_features": features, "gan_noise": "score", "fake_times": Fixed(0.6)}
    method = FDistill(gan=2.0, gan_fake=3.0, times=Fixed(0.4), fake_space="x0", **how)
    nets = nets_like(method)
    eyes, path = getattr(nets, features), EDM()
    at = lambda t: torch.full((8,), t, dtype=F64)
    student, fake = (Draw(0, 1, player, torch.arange(8)) for player in ("student", "fake"))
    x, y = student.normal("x", (8, 2)).requires_grad_(), student.normal("y", (8, 2))

    def logits(x, draw, t, name):
        x_t = path.diffuse(x, draw.normal(name, (8, 2)), at(t))
        return nets.disc(*eyes.features(x_t, at(t), None, ("mid",)))

    loss, logs = method.student_loss(x, nets, {}, student)
    want = nn.functional.softplus(-logits(x, student, 0.4, "eps")).mean()
    assert float(logs["gan"].detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    plain = replace(method, gan=0.0).student_loss(x, nets, {}, student)[0]
    gradient = lambda loss: torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(gradient(loss) - gradient(plain), 2 * gradient(want), rtol=1e-4, atol=1e-6)
    loss, logs = method.fake_loss(x.detach(), nets, {"real": y}, fake)
    own = logits(x.detach(), fake, 0.6, "eps"), logits(y, fake, 0.6, "gan_real_eps")
    want = nn.functional.softplus(own[0]).mean() + nn.functional.softplus(-own[1]).mean()
    assert float(logs["gan"].detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    x0 = nets.fake(path.diffuse(x.detach(), fake.normal("eps", (8, 2)), at(0.6)), at(0.6)).x0
    score = (x0 - x.detach()).square().mean()
    assert float(loss.detach()) == pytest.approx(float((score + 3 * want).detach()), rel=1e-5)
    gradients = [torch.autograd.grad(one, [*nets.fake.net.parameters()], retain_graph=True)[0] for one in (loss, score)]
    assert torch.allclose(*gradients, rtol=1e-5) == (features == "teacher")


def test_a_ratio_is_bounded():
    method = FDistill(taps=("mid",), divergence="forward-kl", ratio_bins=0, **LEVELS)
    nets = nets_like(method)
    for bias, bound in ((-50.0, 0.1), (50.0, 20.0)):
        nets.disc[-1].bias.data.fill_(bias)
        logs = turns(method, nets)[0][1]
        assert float(logs["h_low"]) == pytest.approx(bound) == float(logs["h_high"]) == float(logs["ratio"])


def test_it_adds_no_call_and_no_gradient():
    """The features are of the fake score's own pass; the head has a gradient from the GAN alone."""
    method = FDistill(taps=("mid",), gan=0.0)
    nets, calls = nets_like(method), []
    nets.fake.net.first.register_forward_hook(lambda *_: calls.append(1))
    (student, _), _ = turns(method, nets)
    assert len(calls) == 3  # one of the student's turn, two of the fake's
    draw = Draw(0, 1, "student", torch.arange(8))
    method.student_loss(method.sample(nets, {}, draw), nets, {}, draw)[0].backward()
    assert all(p.grad is None for p in (*nets.disc.parameters(), *nets.fake.net.parameters()))


@pytest.mark.parametrize(
    ("fields", "says"),
    (
        ({"divergence": "kl"}, "divergence is 'kl'; it must be one of reverse-kl, forward-kl"),
        ({"low": 2.0, "high": 1.0}, "low = 2.0 to high = 1.0; 0 < low <= high"),
        ({"low": 0.0}, "0 < low"),
        ({"gan_fake": 0.0}, "learns if above 0"),
        ({"gan_noise": "same"}, "gan_noise 'same'; the first must be"),
    ),
)
def test_mistakes(fields, says):
    with pytest.raises(ValueError, match=says):
        FDistill(**fields)
