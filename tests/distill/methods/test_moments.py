"""Moment matching: its gradients are those of Gaussian algebra, its step is DDPM's posterior, and more calls help."""

from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, Oracle, Whitened, exact, kl, problem
from tiny import Tiny, filled, tiny

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import KINDS, Flow
from distill.diffusion.student import Student, grid_times
from distill.diffusion.times import Uniform
from distill.method import Requirement
from distill.methods import Denoise, MomentMatching
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train

D = 2
NOISES = ("ancestral", "fresh")
CALLS = (0.9, 0.5)  # the largest gap is the last one, 0.5
LEVELS = {"inside": (0.4, 0.6, 0.36, 0.66), "clamped": (0.8, 0.5, 0.72, 0.9)}  # random numbers of s and d; s, t


class Fixed(Whitened):
    """Whitened data, eps and n; the random numbers of s and of the gap are given."""

    def __init__(self, s, gap):
        super().__init__(32, D, ("data", "eps", "n"))
        self.fixed = {"s": s, "gap": gap}

    def uniform(self, name, shape):
        return torch.full(shape, self.fixed[name], dtype=F64)


@dataclass
class Affine:
    """M u + m of a standard normal vector u [3 D], so that expectations of products are sums."""

    M: torch.Tensor
    m: torch.Tensor

    def __add__(self, other):
        return Affine(self.M + other.M, self.m + other.m)

    def __rmatmul__(self, A):
        return Affine(A @ self.M, A @ self.m)

    def __rmul__(self, a):
        return Affine(a * self.M, a * self.m)

    def plus(self, b):
        return Affine(self.M, self.m + b)

    def with_(self, other):
        """E[self other^T]."""
        return self.M @ other.M.T + torch.outer(self.m, other.m)

    def regress_on(self, other):
        """(K, k): E[self | other] = K other + k."""
        K = self.M @ other.M.T @ torch.linalg.inv(other.M @ other.M.T)
        return K, self.m - K @ other.m


def scene(law, A, b, path, s, t, noise):
    """y, x_t, x and x_s of the student x = A x_t + b. x_s by the formula of DDPM's posterior."""
    data, eps, n = (Affine(one, torch.zeros(D, dtype=F64)) for one in torch.eye(3 * D, dtype=F64).split(D))
    (a_s, s_s), (a_t, s_t) = ([float(one) for one in path.coefficients(torch.tensor([u], dtype=F64))] for u in (s, t))
    y = (torch.linalg.cholesky(law.cov) @ data).plus(law.mean)
    x_t = a_t * y + s_t * eps
    x = (A @ x_t).plus(b)
    if noise == "fresh":
        return y, x_t, x, a_s * x + s_s * n, (a_s, s_s)
    a = a_t / a_s
    rest = s_t**2 - (a * s_s) ** 2  # sigma_{t|s}^2
    x_s = (a * s_s**2 / s_t**2) * x_t + (a_s * rest / s_t**2) * x + (rest**0.5 * s_s / s_t) * n
    return y, x_t, x, x_s, (a_s, s_s)


def linear(K, k, path, kind="x0"):
    """The denoiser K x + k, with gradient to K and k."""
    return Denoiser(Oracle(lambda x, *at: x @ K.T + k, path, kind), path, kind)


def leaf(*tensors):
    return [one.detach().clone().requires_grad_() for one in tensors]


@pytest.fixture(params=SCHEDULES)
def path(request):
    return SCHEDULES[request.param]


def turn(method, player, path, level, noise, kind="x0", off=0.0):
    """Loss and gradients of a turn on Gaussian data, and what they are made of. off: error of the fake's gain."""
    u, v, s, t = LEVELS[level]
    law, line = problem(D)
    A, b = leaf(line.A, line.b)
    y, x_t, x, x_s, at = scene(law, A.detach(), b.detach(), path, s, t, noise)
    real = y.regress_on(at[0] * y + Affine(at[1] * torch.eye(3 * D, dtype=F64)[D : 2 * D], 0 * y.m))
    ours = x.regress_on(x_s)
    best = [(p + method.anchor * q) / (1 + method.anchor) for p, q in zip(ours, real)]
    K, k = leaf(best[0] + off, best[1])
    student = Student(linear(A, b, path, kind), CALLS, renoise=noise)
    nets = Nets(exact(law, path, kind), student, (D,), linear(K, k, path, kind))
    draw = Fixed(u, v)
    batch = {"real": law.mean + draw.columns["data"] @ torch.linalg.cholesky(law.cov).T}
    samples = method.sample(nets, batch, draw)
    if player == "fake":
        samples = samples.detach()
    loss, _ = getattr(method, f"{player}_loss")(samples, nets, batch, draw)
    grads = torch.autograd.grad(loss, (A, b) if player == "student" else (K, k))
    predicted = [(K @ x_s).plus(k) for K, k in ((K.detach(), k.detach()), real)]
    return loss.detach(), grads, (law, A, b, x_t, x, predicted, at)


def near(got, want, rtol=1e-8):
    assert (got - want).norm() <= rtol * want.norm(), f"off by {(got - want).norm() / want.norm():.3g}"


@pytest.mark.level(1, "MomentMatching")
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("level", LEVELS)
def test_student_gradient(path, level, noise):
    """E[g dx] of the gap g of two Gaussian conditional expectations, 1 / (1 + lambda) of it, for every kind."""
    for kind, anchor, reduction in zip(KINDS, (1.0, 0.0, 1.0, 3.0, 0.5), ("sum", "mean") * 3):
        method = MomentMatching(anchor=anchor, reduction=reduction)
        loss, got, (_, _, _, x_t, x, (fake, real), at) = turn(method, "student", path, level, noise, kind)
        gap = fake + -1.0 * real
        share = D if reduction == "mean" else 1
        near(got[0], gap.with_(x_t) / share)
        near(got[1], gap.m / share)
        near(loss, gap.with_(gap).trace() / 2 / share)


@pytest.mark.parametrize("level", LEVELS)
def test_with_fresh_noise_it_descends_the_divergence(path, level):
    """The gradient is (sigma_s / alpha_s)^2 / (1 + lambda) of that of KL(x_s of the student || x_s of the teacher)."""
    method = MomentMatching(anchor=1.0, reduction="sum")
    _, got, (law, A, b, x_t, _, _, (a_s, s_s)) = turn(method, "student", path, level, "fresh")
    root = torch.linalg.cholesky(x_t.M @ x_t.M.T)  # x = A x_t + b has the law of A root z + (A m + b)
    divergence = kl(law, A @ root, A @ x_t.m + b, s_s / a_s)
    for one, want in zip(got, torch.autograd.grad(divergence, (A, b))):
        near(one, (s_s / a_s) ** 2 / 2 * want)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("anchor", (0.0, 1.0, 3.0))
def test_optimal_fake(path, noise, anchor):
    """(E[x | x_s] + lambda D_real) / (1 + lambda) has no gradient; elsewhere the loss is that of Gaussian algebra."""
    method = MomentMatching(anchor=anchor, reduction="sum")
    _, at_best, _ = turn(method, "fake", path, "inside", noise)
    for reduction, share in (("sum", 1), ("mean", D)):
        method = MomentMatching(anchor=anchor, reduction=reduction)
        loss, away, (*_, x, (fake, real), _) = turn(method, "fake", path, "inside", noise, off=0.1)
        first, second = x + -1.0 * fake, real + -1.0 * fake
        near(loss, (first.with_(first) + anchor * second.with_(second)).trace() / share)
    assert all(g.norm() < 1e-8 * away[0].norm() for g in at_best)


class TestByHand:
    """With labels and guidance 2, on a table: written out from the same random numbers."""

    def nets(self, method=MomentMatching(guidance=2.0), **student):
        teacher = tiny(SCHEDULES["vp"], classes=3)
        found = build(method, teacher, (D,), {"label": torch.tensor([0])}, StudentConfig(**student))
        for i, net in enumerate((found.student.denoiser.net, found.fake_score.net), 1):
            filled(net, i, F64)
        return found

    @pytest.mark.parametrize("noise", NOISES)
    def test_losses(self, noise):
        method = MomentMatching(guidance=2.0, anchor=0.7)
        nets = self.nets(method, times=(0.8, 0.3), renoise=noise)
        n = 16
        c = {"label": torch.arange(n) % 3}
        y = torch.linspace(-1, 1, D * n, dtype=F64).reshape(n, D)
        batch = {"real": y, "real_c": c, "c": {"label": (torch.arange(n) + 1) % 3}}
        path = nets.teacher.path
        for player in ("fake", "student"):
            draw = Draw(3, 5, player, torch.arange(n))
            s = 0.8 * draw.uniform("s", (n,)).double()
            t = (s + 0.5 * draw.uniform("gap", (n,))).clamp(max=0.8)
            x_t = path.diffuse(y, draw.normal("eps", (n, D)).double(), t)
            x = nets.student.denoiser(x_t, t, c).x0
            x_s = nets.student.renoise_from(x_t, x.detach(), t, s, draw.normal("n", (n, D)).double())
            cond, null = (nets.teacher(x_s, s, one) for one in (c, {"label": torch.full((n,), 3)}))
            real, fake = (2 * cond.x0 - null.x0).detach(), nets.fake_score(x_s, s, c).x0
            got = method.sample(nets, batch, draw)
            torch.testing.assert_close(got, x)
            loss, logs = getattr(method, f"{player}_loss")(x, nets, batch, draw)
            if player == "fake":
                want = ((x - fake) ** 2 + 0.7 * (real - fake) ** 2).mean()
                torch.testing.assert_close(loss, want)
                continue
            gap = (fake - real).detach()
            torch.testing.assert_close(torch.autograd.grad(loss, x)[0], gap / gap.numel())
            torch.testing.assert_close(logs, {"score_gap": gap.square().mean()})

    def test_gradients_reach_one_network(self):
        """The student's through x alone, although the fake's weights and the teacher's could have one."""
        nets = self.nets(renoise="ancestral")
        draw = Draw(0, 0, "student", torch.arange(4))
        batch = {"real": torch.ones(4, D, dtype=F64), "real_c": {"label": torch.arange(4) % 3}}
        modules = {"teacher": nets.teacher.net, **nets.modules()}
        for module in modules.values():
            module.requires_grad_(True)
        kept = []  # whether a call of the fake keeps activations
        nets.fake_score.net.register_forward_hook(lambda *_: kept.append(torch.is_grad_enabled()))
        for player in ("student", "fake"):
            x = MomentMatching(guidance=2.0).sample(nets, batch, draw)
            loss = getattr(MomentMatching(guidance=2.0), f"{player}_loss")
            loss(x if player == "student" else x.detach(), nets, batch, draw)[0].backward()
            moved = {name for name, net in modules.items() if any(p.grad is not None for p in net.parameters())}
            assert moved == ({"student", "fake"} if player == "fake" else {"student"})
        assert kept == [False, True]

    def test_declarations(self):
        method = MomentMatching()
        assert [(u.player, u.every, u.reuse) for u in method.updates()] == [("fake", 1, False), ("student", 1, False)]
        assert method.roles == ("fake",) and method.requirements == (Requirement.REAL,)
        assert set(MomentMatching(guidance=2.0).requirements) == {Requirement.REAL, Requirement.NULL_CONDITION}

    def test_noise(self):
        """Without new noise x_s is a function of x_t, and there is nothing to match."""
        with pytest.raises(ValueError, match="renoise is 'ddim'; .* pass --student.renoise ancestral .* or fresh"):
            self.nets(renoise="ddim")
        with pytest.raises(ValueError, match="2 calls with 'tcd' noise .* pass --student.renoise ancestral or fresh"):
            self.nets(steps=2, renoise="tcd")


class TestToy:
    """Data near -1 and 1, an exact teacher, a student of a few hundred weights that starts as a denoiser."""

    PATH, STD = Flow(), 0.2

    def data(self, draw):
        sign = 2.0 * draw.integers("sign", 2)[:, None] - 1
        return {"real": sign + self.STD * draw.normal("within", tuple(sign.shape))}

    def teacher(self):
        def predict(x, alpha, sigma):
            var = alpha**2 * self.STD**2 + sigma**2
            mean = torch.tanh(alpha * x / var)  # of the sign
            return mean + alpha * self.STD**2 / var * (x - alpha * mean)

        return Denoiser(Oracle(predict, self.PATH, "flow"), self.PATH, "flow")

    def denoiser(self):
        """Trained as the teacher is, until it is good enough to start from."""
        net = filled(Tiny(1, 48))
        student = Student(Denoiser(net, self.PATH, "flow"))
        cfg = TrainConfig(max_train_steps=120, train_batch_size=128, learning_rate=1e-2, lr_scheduler="linear")
        method = Denoise(p_drop=0.0, times=Uniform(0.01, 0.99))
        *_, _ = train(method, Nets(self.teacher(), student, (1,)), self.data, cfg, Accelerator(cpu=True))
        return student.denoiser

    def distance(self, student):
        """Wasserstein distance of 4000 samples from as many of the data."""
        draw = Draw(1, 0, "evaluate", torch.arange(4000))
        with torch.no_grad():
            x = student.generate(draw.normal("z", (4000, 1)), None, draw)
        return float((x.sort(0).values - self.data(draw)["real"].sort(0).values).abs().mean())

    @pytest.mark.level(2, "MomentMatching")
    def test_the_distance_falls(self):
        """Of four ancestral calls, from .39 to .08."""
        start = self.denoiser()
        student = Student(start.copy(), grid_times(4), renoise="ancestral")
        before = self.distance(student)
        cfg = TrainConfig(max_train_steps=120, train_batch_size=128, learning_rate=5e-3, lr_scheduler="linear")
        nets = Nets(self.teacher(), student, (1,), fake=start.copy())
        *_, _ = train(MomentMatching(), nets, self.data, cfg, Accelerator(cpu=True))
        after = self.distance(student)
        assert before > 0.2 and after < 0.5 * before, (before, after)
