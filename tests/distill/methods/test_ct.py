"""Consistency training: the curricula's numbers, its fixed point for a Gaussian, its limits. All in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gaussian import F64, SCHEDULES, Oracle, Whitened, exact, problem
from tiny import tiny
from torch import nn

from distill.diffusion.curriculum import ECTCurriculum, ICTCurriculum
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import EDM
from distill.diffusion.student import Student
from distill.diffusion.times import LogNormal
from distill.losses import cauchy_norm, huber_norm
from distill.methods import CT, Denoise
from distill.random import Draw
from distill.roles import Nets

N = 8


def turn(n=N, step=0):
    return Draw(0, step, "student", torch.arange(n))


def nets_of(schedule="edm", d=2):
    kind = "edm" if schedule == "edm" else "v"
    teacher, student = (tiny(SCHEDULES[schedule], kind, seed, d=d) for seed in (0, 1))
    return Nets(teacher, Student(student, (0.5,)), (d,))


class TestCurricula:
    def test_ict(self):
        """Levels, shares, weights and doublings as tabled from the paper's formulas."""
        levels, share = ICTCurriculum().grid(0, EDM())
        want = (0.002, 0.0167, 0.0851, 0.3183, 0.9654, 2.5152, 5.8389, 12.3816, 24.4083, 45.3137, 80)
        assert levels.tolist() == pytest.approx(want, abs=6e-5)
        want = (0.0626, 0.1817, 0.2455, 0.2135, 0.1424, 0.0806, 0.0411, 0.0196, 0.0089, 0.0040)
        assert share.diff().tolist() == pytest.approx(want, abs=6e-5)
        want = (67.9, 14.6, 4.29, 1.545, 0.645, 0.301, 0.153, 0.083, 0.048, 0.029)
        assert (1 / levels.diff()).tolist() == pytest.approx(want, rel=0.02)
        n = [ICTCurriculum().intervals(k) for k in (0, 49_999, 50_000, 100_000, 349_999, 350_000, 399_999, 10**6)]
        assert n == [10, 10, 20, 40, 640, 1280, 1280, 1280]
        assert [ICTCurriculum(n_0=10, n_1=50, steps=30).intervals(k) for k in (0, 10, 20, 30)] == [10, 20, 40, 50]

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_ict_pairs(self, schedule):
        """Neighbours of the grid as often as their share; the lowest level is clean; all in the schedule's range."""
        path, curriculum = SCHEDULES[schedule], ICTCurriculum()
        t, r, gap = curriculum(turn(20_000), 20_000, path)
        levels, share = curriculum.grid(0, path)
        i = (path.ratio(t)[:, None] - levels).abs().argmin(1)
        torch.testing.assert_close(path.ratio(t), levels[i], rtol=1e-9, atol=1e-12)
        assert int(i.min()) == 1 and torch.equal(r == 0, i == 1)
        torch.testing.assert_close(gap, levels[i] - levels[i - 1])
        torch.testing.assert_close(path.ratio(r)[i > 1], levels[i - 1][i > 1], rtol=1e-9, atol=1e-12)
        often = torch.bincount(i, minlength=11)[1:] / len(i)
        assert (often - share.diff()).abs().max() < 0.011  # four standard deviations of 0.43 / sqrt(20000)

    def test_ect(self):
        """s_r / s_t as in the authors' code: by the stage, and by q at once."""
        s = torch.tensor([0.5, 80.0], dtype=F64)
        for q, step, want in ((2, 0, (0, 0.5)), (2, 7 * 25_000, (0.984, 0.996)), (256, 0, (0.984, 0.996))):
            assert ECTCurriculum(q=q).level_ratio(s, step).tolist() == pytest.approx(want, abs=5e-4)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_ect_pairs(self, schedule):
        path, curriculum = SCHEDULES[schedule], ECTCurriculum(every=10)
        for step in (0, 75):
            t, r, gap = curriculum(turn(500, step), 500, path)
            s = path.ratio(t)
            assert torch.equal(t, LogNormal(-1.1, 2.0)(turn(500, step), "t", 500, path))
            assert (gap > 0).all() and (r <= t).all() and 0 < (r > 0).sum()
            some = r > 0
            torch.testing.assert_close(
                (path.ratio(r) / s)[some], curriculum.level_ratio(s, step)[some], rtol=1e-7, atol=0
            )
            torch.testing.assert_close(gap, s * (1 - curriculum.level_ratio(s, step)))

    @pytest.mark.parametrize(
        "make, says",
        (
            (lambda: ECTCurriculum(q=1.0), "q is 1.0; it must be above 1"),
            (lambda: ICTCurriculum(n_0=20, n_1=10), "from n_0 = 20 to n_1 = 10; each must rise"),
            (lambda: ICTCurriculum(low=1.0, high=0.5), "from low = 1.0 to high = 0.5"),
            (lambda: CT(distance="cauchy"), "c is 0.0; the Cauchy distance needs a c above 0"),
        ),
    )
    def test_mistakes(self, make, says):
        with pytest.raises(ValueError, match=says):
            make()


class TestDistances:
    def test_values(self):
        delta = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=F64, requires_grad=True)
        assert huber_norm(delta).tolist() == [5.0, 0.0]
        assert huber_norm(delta, 12.0).tolist() == [1.0, 0.0]
        assert cauchy_norm(delta, 5.0).tolist() == pytest.approx([np.log(1.5), 0.0])
        for distance in (huber_norm(delta), huber_norm(delta, 12.0), cauchy_norm(delta, 5.0)):
            (slope,) = torch.autograd.grad(distance.sum(), delta)
            assert torch.isfinite(slope).all() and not slope[1].any()

    @pytest.mark.parametrize("distance, c", (("huber", 0.0), ("huber", 0.3), ("cauchy", 0.3), ("square", 0.0)))
    def test_of_the_whole_vector_by_hand(self, distance, c):
        """The mean over samples of d / (s_t - s_r); the teacher is not called; no gradient by way of the target."""
        curriculum = ECTCurriculum(every=1)
        method, nets, draw = CT(curriculum, distance, c), nets_of(), turn(step=1)
        nets.teacher.net.register_forward_hook(lambda *a: pytest.fail("the teacher was called"))
        x, path, net = draw.normal("real", (N, 2)).double(), EDM(), nets.student.denoiser
        loss, logs = method.student_loss(x, nets, {}, draw)
        t, r, gap = curriculum(draw, N, path)
        assert 0 < float(logs["clean"]) == float((r == 0).float().mean()) < 1
        eps = draw.normal("eps", (N, 2)).double()
        aim = torch.where((r > 0)[:, None], net(path.diffuse(x, eps, r), r).x0, x).detach()
        size = (net(path.diffuse(x, eps, t), t).x0 - aim).square().sum(1)
        d = {"huber": (size + c**2).sqrt() - c, "square": size, "cauchy": (1 + size / (2 * c**2 or 1)).log()}[distance]
        torch.testing.assert_close(loss, (d / gap).mean())
        torch.testing.assert_close(logs["delta"], (size / 2).mean().detach())  # of two elements; without a graph
        assert not logs["delta"].requires_grad and float(logs["clean"]) == pytest.approx(
            float((r == 0).double().mean())
        )
        ours, want = (torch.autograd.grad(one, [*net.net.parameters()]) for one in (loss, (d / gap).mean()))
        for a, b in zip(ours, want):
            torch.testing.assert_close(a, b)
        scaled, _ = replace(method, c_out=True).student_loss(x, nets, {}, draw)  # EDM's sigma_d is .5
        torch.testing.assert_close(scaled, (d * (path.ratio(t) ** 2 + 0.25) / (0.5 * path.ratio(t)) ** 2).mean())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_of_clean_targets_it_is_denoising(schedule):
    """Bit for bit, for a network that predicts x0 of one number; with noisy targets it is another loss."""
    make = lambda seed: tiny(SCHEDULES[schedule], "x0", seed, d=1)
    nets, draw = Nets(make(0), Student(make(1), (0.5,)), (1,)), turn()
    x, law = draw.normal("real", (N, 1)).double(), LogNormal(-1.1, 1.0)
    net, base = nets.student.denoiser.net, Denoise(0.0, law)
    both = lambda loss: (loss, *torch.autograd.grad(loss, [*net.parameters()]))
    off = CT(ECTCurriculum(law, q=1 + 1e-9), "square", weighted=False)
    want = both(base.student_loss(x, nets, {}, draw)[0])
    assert all(torch.equal(a, b) for a, b in zip(both(off.student_loss(x, nets, {}, draw)[0]), want))
    on = both(replace(off, curriculum=ECTCurriculum(law, q=256)).student_loss(x, nets, {}, draw)[0])
    assert not any(torch.equal(a, b) for a, b in zip(on, want))


class Gain(nn.Module):
    """x0 = `predict` with a matrix added to its gain, 0 at first: the gradient to it is E of delta times the input."""

    def __init__(self, predict, law, path, kind):
        super().__init__()
        self.more = nn.Parameter(torch.zeros(2, 2, dtype=F64))
        move = lambda x, a, s: predict(x, a, s) + (x / a - law.mean) / (1 + s / a) @ self.more
        self.oracle = Oracle(move, path, kind)

    def forward(self, x, native):
        return self.oracle(x, native)


def bootstrapped(law, levels):
    """What f(x_t) = E[ f(x_r) | x_t ] has for a solution from f = x at the lowest level on."""
    gains = [torch.ones_like(law.var)]
    for low, high in zip([0.0, *levels[1:-1].tolist()], levels[1:].tolist()):
        gains.append(gains[-1] * (law.var + low * high) / (law.var + high**2))
    gains = torch.stack(gains)

    def predict(x, alpha, sigma):
        i = ((sigma / alpha).log() - levels.log()).abs().argmin(1)
        return law.mean + gains[i] * ((x / alpha - law.mean) @ law.axes) @ law.axes.T

    return predict


PAIRS = [(s, k) for s in SCHEDULES for k in ("x0", "eps", "v", "flow", "edm") if s in ("vp", "edm") or k == "v"]


@pytest.mark.level(1, "CT")
@pytest.mark.parametrize("schedule, kind", PAIRS)
class TestGaussian:
    """Expected gradients to the student, at every pair of the grid, over data of a Gaussian."""

    LEVELS = {"low": 0.05, "high": 10.0, "mean": 0.0}

    def slope(self, schedule, kind, predict, n, pair=None):
        """Size of the expected gradient at neighbours of a grid of n intervals."""
        law, path, curriculum = problem(2)[0], SCHEDULES[schedule], ICTCurriculum(n_0=n, n_1=n, **self.LEVELS)
        levels, share = curriculum.grid(0, path)

        net = Gain(predict(law, levels), law, path, kind)
        student = Denoiser(net, path, kind)
        blocks = n if pair is None else 1
        draw = Whitened(16, 2, ("real", "eps"), blocks)
        middle = (share[1:] + share[:-1]) / 2 if pair is None else share[pair - 1 : pair + 1].mean().reshape(1)
        draw.uniform = lambda name, shape: middle.repeat_interleave(16)
        x = law.mean + draw.columns["real"] @ torch.linalg.cholesky(law.cov).T
        nets = Nets(exact(law, path, kind), Student(student, (0.5,)), (2,))
        method = CT(curriculum, "square")
        (g,) = torch.autograd.grad(method.student_loss(x, nets, {}, draw)[0], net.more)
        return float(g.abs().max())

    def test_fixed_point(self, schedule, kind):
        """f(x_t) = E[ f(x_r) | x_t ] has no gradient at any pair; the ODE's map and the teacher's x0 have."""
        assert self.slope(schedule, kind, bootstrapped, 12) < 1e-12
        assert all(self.slope(schedule, kind, bootstrapped, 12, pair) < 1e-11 for pair in (1, 6, 12))
        assert self.slope(schedule, kind, lambda law, levels: law.denoise, 12) > 1e-2
        assert self.slope(schedule, kind, self.carried, 12) > 1e-3

    @staticmethod
    def carried(law, levels):
        clean = (torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64))
        return lambda x, *start: law.carry(x, start, clean)

    def test_the_consistency_function_in_the_limit(self, schedule, kind):
        """At the ODE's own map the gradient falls as the gap of the levels does."""
        n = (40, 80, 160)
        g = [self.slope(schedule, kind, self.carried, k, k // 2) for k in n]
        assert -np.polyfit(np.log(n), np.log(g), 1)[0] == pytest.approx(1.0, abs=0.1)
