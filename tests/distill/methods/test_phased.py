"""Phased DMD: on the levels above s, x_s is the data; the last phase is DMD2; two phases end at the teacher's law."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import (
    F64,
    RATIOS,
    SCHEDULES,
    Gaussian,
    Line,
    Oracle,
    Whitened,
    exact,
    kl_gradient,
    nets_of,
    problem,
    student_gradient,
)
from scipy.stats import kstest
from tiny import tiny

from distill.diffusion.interval import Interval, Tail
from distill.diffusion.schedule import EDM, KINDS
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed, ShiftedTimes, Uniform
from distill.methods import DMD2, PhasedDMD
from distill.networks.lora import LoRA
from distill.random import Draw
from distill.training import checkpoint
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train

BARE = PhasedDMD(guidance=1.0, reduction="sum", normalise=False)
LEVEL = 0.6  # sigma / alpha at s


def near(got, want, rtol=1e-9):
    assert (got - want).norm() <= rtol * want.norm(), f"off by {(got - want).norm() / want.norm():.3g}"


def interval(path):
    """The levels above LEVEL, and (alpha_s, sigma_s)."""
    s = float(path.time(torch.tensor([LEVEL], dtype=F64)))
    found = Interval(path, s)
    return found, found.anchor()


def noisy(law, anchor):
    """The law of x_s where that of x_0 is `law`."""
    alpha, sigma = anchor
    return Gaussian(alpha * law.mean, alpha**2 * law.cov + sigma**2 * torch.eye(len(law.mean), dtype=F64))


def root(law):
    """A generator z -> A z + b of the law."""
    return Line(law.axes @ law.var.sqrt().diag(), law.mean)


def phased(line, teacher, end, **roles):
    """Roles whose student, x = A z + b, ends at the time `end`."""
    nets = nets_of(line, teacher, **roles)
    nets.student = Student(nets.student.denoiser, (1.0, end), 1.0, phases=2)
    return nets


def gradient(method, nets, draw):
    """Gradient to (A, b) of the loss on x_s = A z + b."""
    line = nets.student.denoiser.net
    x = draw.normal("z", (len(draw.samples), len(line.b))) @ line.A.T + line.b
    return torch.autograd.grad(method.student_loss(x, nets, {}, draw)[0], (line.A, line.b))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_interval_is_a_path(schedule):
    """Its coefficients are those of the transition, its time is their inverse, it ends where the base does."""
    base = SCHEDULES[schedule]
    path, anchor = interval(base)
    u = torch.linspace(0, 1, 21, dtype=F64)
    x, eps = torch.randn(2, 21, 3, dtype=F64)
    want = base.transition(x, torch.full_like(u, path.s), path.outer(u), eps)
    torch.testing.assert_close(path.diffuse(x, eps, u), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.time(path.ratio(u[2:-1])), u[2:-1], rtol=1e-9, atol=1e-9)
    assert float(path.outer(u)[-1]) == 1 and torch.equal(path.native(u), base.native(path.outer(u)))
    assert anchor[1] / anchor[0] == pytest.approx(LEVEL)


@pytest.mark.level(1, "PhasedDMD")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
class TestClosedForms:
    def test_a_denoiser_of_x0_is_one_of_xs(self, schedule, kind):
        """Read on the interval, the optimal denoiser of N(mu, Sigma) is that of the law of x_s on the path above s."""
        path, anchor = interval(SCHEDULES[schedule])
        law, u = problem(2)[0], torch.linspace(0.1, 0.9, 9, dtype=F64)
        x, (a, b) = torch.randn(9, 2, dtype=F64), (one[:, None] for one in path.coefficients(u))
        pred = exact(law, SCHEDULES[schedule], kind).on_schedule(path)(x, u)
        want = noisy(law, anchor).denoise(x, a, b)
        torch.testing.assert_close(pred.x0, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pred.eps, (x - a * want) / b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pred.score, -pred.eps / b, rtol=1e-9, atol=1e-9)

    def test_student_gradient(self, schedule, kind):
        """(sigma / alpha)^2 of the gradient of the KL between the laws of x_s, at that level of the path above s."""
        path, anchor = interval(SCHEDULES[schedule])
        base, (law, _) = path.base, problem(2)
        start = problem(2, seed=1)[0]  # the law of x_0 whose x_s the generator makes
        line, fake = root(noisy(start, anchor)), exact(start, base, kind)
        for u in path.time(torch.tensor(RATIOS[1:], dtype=F64)):
            r = float(path.ratio(u))
            got = gradient(
                replace(BARE, times=Fixed(float(path.outer(u)))),
                phased(line, exact(law, base, kind), path.s, fake=fake),
                Whitened(64, 2),
            )
            for one, want in zip(got, kl_gradient(noisy(law, anchor), line.A.detach(), line.b.detach(), r)):
                near(one, r**2 * want, 1e-8)

    def test_fake_target(self, schedule, kind):
        """At the optimal denoiser of x_0 the loss on x_s is stationary: its target has the right mean given x_t."""
        path, anchor = interval(SCHEDULES[schedule])
        law, d = problem(2)[0], 2
        shift = torch.zeros(1, d, dtype=F64, requires_grad=True)  # of x0, beside x and 1
        gain = torch.zeros(d, d, dtype=F64, requires_grad=True)
        for u in (0.2, 0.8):
            predict = lambda x, *at: law.denoise(x, *at) + x @ gain.T + shift
            net = Oracle(predict, path.base, kind)
            fake = replace(exact(law, path.base, kind), net=net)
            draw = Whitened(64, d)
            x = root(noisy(law, anchor))(draw.columns["z"], None).detach()
            nets = phased(root(law), exact(law, path.base), path.s, fake=fake)
            t = float(path.outer(torch.tensor(u)))
            loss, _ = replace(BARE, fake_times=Fixed(t)).fake_loss(x, nets, {}, draw)
            found = torch.autograd.grad(loss, (shift, gain))
            plain = nets.fake(
                path.diffuse(x, draw.columns["eps"], torch.full((64,), u)), path.outer(torch.full((64,), u))
            )
            naive = ((plain.out - plain.target(x, draw.columns["eps"])) ** 2).sum() / 64  # as if x_s were x_0
            wrong = torch.autograd.grad(naive, (shift, gain))
            assert all(g.norm() < 1e-9 for g in found) and max(g.norm() for g in wrong) > 1e-4


def test_weight_near_the_boundary():
    """min(1, 10 b^2): a squared error stays finite where the target's variance grows without bound."""
    path = Interval(SCHEDULES["flow"], 0.5)
    u, x = torch.tensor([0.0, 1e-4, 0.02, 0.9], dtype=F64), torch.randn(4, 2, dtype=F64)
    eps, b = torch.randn(4, 2, dtype=F64), path.coefficients(torch.tensor([0.0, 1e-4, 0.02, 0.9], dtype=F64))[1]
    pred = tiny(SCHEDULES["flow"], "flow").on_schedule(path)(path.diffuse(x, eps, u), u)
    torch.testing.assert_close(pred.weight[:, 0], (10 * b**2).clamp(max=1))
    assert float(pred.weight[0]) == 0 and float(pred.weight[-1]) == 1
    error = pred.weight * (pred.out - pred.target(x, eps)) ** 2
    assert torch.isfinite(error).all() and error.max() < 100


def test_laws_above_the_boundary():
    """LightX2V: t = 7 r / (1 + 6 r), shifted once, r uniform in the steps 520 .. 980 where the phase ends at r = .5."""
    path, draw = Interval(SCHEDULES["flow"], 0.875), Draw(0, 0, "student", torch.arange(20_000))  # 7 / 2 / (1 + 6 / 2)
    nets = phased(root(problem(2)[0]), exact(problem(2)[0], path.base), path.s)
    method = replace(BARE, times=ShiftedTimes(Uniform(0.02, 0.98), 7.0), margin=20 / 480).phase_method(nets)
    t = path.outer(method.times(draw, "t", 20_000, path))
    r = (t / (7 - 6 * t) - 0.52) / 0.46
    assert kstest(r.numpy(), "uniform").pvalue > 1e-2 and 0 <= r.min() < 1e-3 and 1 - 1e-3 < r.max() <= 1
    everything = path.outer(method.gan_times(draw, "u", 20_000, path))  # of the discriminator: without a margin
    assert everything.min() == pytest.approx(875 / 999) and everything.max() == 1  # the next step of the table
    assert kstest(everything.numpy(), "uniform", (0.875, 0.125)).statistic < 0.015
    with pytest.raises(ValueError, match="no times above 0.875, where the student's phase ends"):
        Tail(Uniform(0.0, 0.875))(draw, "t", 20_000, path)


@pytest.mark.parametrize("schedule", ("vp", "flow"))
def test_the_phases_compose(schedule):
    """Descent of the first to x_s, then of the second, which starts from the first's samples, ends at the teacher."""
    base, (law, _) = SCHEDULES[schedule], problem(2)
    path, anchor = interval(base)
    line = Line(0.5 * torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64))
    goal, (alpha, sigma) = noisy(law, anchor), anchor
    method = replace(BARE, times=Fixed(float(path.outer(torch.tensor(0.5)))))
    for _ in range(150):
        S = line.A.detach() @ line.A.detach().T  # the fake score: x_0's law, which may have a negative variance
        start = Gaussian(line.b.detach() / alpha, (S - sigma**2 * torch.eye(2, dtype=F64)) / alpha**2)
        nets = phased(line, exact(law, base), path.s, fake=exact(start, base))
        for p, g in zip((line.A, line.b), gradient(method, nets, Whitened(16, 2))):
            p.data -= g
    near(line.law.mean, goal.mean, 1e-6)
    near(line.law.cov, goal.cov, 1e-6)
    first = replace(nets.student.denoiser, net=Line(line.A.detach(), line.b.detach()))
    map_ = Line(0.5 * torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64))  # x_s -> x_0, of the second expert
    student = Student(replace(first, net=map_), (1.0, path.s), 1.0, phases=2, experts=(Noiseless(first, base, path.s),))
    assert student.phase == (1, 2) and student.phase_end_time is None
    for _ in range(300):
        A, b = map_.A.detach(), map_.b.detach()
        made = Gaussian(A @ goal.mean + b, A @ goal.cov @ A.T)
        nets = nets_of(map_, exact(law, base), fake=exact(made, base))
        nets.student = student
        _, *found = student_gradient(replace(method, times=Fixed(0.4)), nets, Fresh(64, 2))
        for p, g in zip((map_.A, map_.b), found):
            p.data -= 0.3 * g
    A, b = map_.A.detach(), map_.b.detach()
    near(A @ goal.mean + b, law.mean, 1e-4)
    near(A @ goal.cov @ A.T, law.cov, 1e-4)


class Noiseless:
    """An expert whose x0, brought to s with the noise 0, is x_s itself."""

    def __init__(self, base, path, s):
        self.base, self.alpha = base, path.coefficients(torch.tensor([s], dtype=F64))[0]

    def __call__(self, x, t, c):
        pred = self.base(x, t, c)
        return replace(pred, out=pred.out / self.alpha)


class Fresh(Whitened):
    """Without noise between the calls."""

    def normal(self, name, shape):
        return torch.zeros(shape, dtype=F64) if name.startswith("renoise") else super().normal(name, shape)


class TestTraining:
    """Through the trainer, on a network of a few hundred weights."""

    LAWS = {"times": Uniform(0.05, 0.95), "fake_times": Uniform(0.05, 1.0)}
    C = torch.arange(16) % 3

    def run(self, method, student, steps=6):
        teacher = tiny(EDM(), "edm", dtype=torch.float32, classes=3)
        torch.manual_seed(0)  # of the discriminator
        nets = build(method, teacher, (2,), {"label": self.C[:1]}, student)
        cfg = TrainConfig(max_train_steps=steps, train_batch_size=16, learning_rate=3e-3)
        data = lambda draw: {"c": {"label": self.C}, "real": torch.ones(16, 2), "real_c": {"label": self.C}}
        *_, state = train(method, nets, data, cfg, Accelerator(cpu=True))
        return state

    @pytest.mark.parametrize("gan", (0.0, 0.1))
    def test_one_phase_is_dmd2_bit_for_bit(self, gan):
        options = {"guidance": 1.5, "every": 2, "gan": gan, "gan_fake": gan, "taps": ("mid",), **self.LAWS}
        student = StudentConfig(sigma=2.5, steps=2)
        ours, base = (self.run(kind(**options), student) for kind in (PhasedDMD, DMD2))
        assert ours.logs.keys() == base.logs.keys() and all(torch.equal(ours.logs[k], base.logs[k]) for k in base.logs)
        for role, net in ours.nets.modules().items():
            assert all(torch.equal(a, b) for a, b in zip(net.parameters(), base.nets.modules()[role].parameters()))
        two = self.run(PhasedDMD(**options), replace(student, phases=2))
        assert not torch.equal(two.logs["fake/loss"], base.logs["fake/loss"])

    @pytest.mark.parametrize("rank", (None, 2))
    def test_two_phases(self, rank, tmp_path):
        """The first is trained and frozen, the second starts from its samples; with adapters on one backbone, too."""
        lora = LoRA(rank=rank, alpha=2, targets=("mid",))
        student = StudentConfig(sigma=2.5, steps=4, phases=2, renoise="ddim", lora=lora)
        method = PhasedDMD(guidance=1.5, every=1, **self.LAWS)
        first = self.run(method, student)
        saved = checkpoint.save(first, tmp_path)
        second = self.run(method, replace(student, experts=(f"{saved}",)))
        nets = second.nets
        expert, own = nets.student.experts[0].net, nets.student.denoiser.net
        average = dict(first.ema.net.named_parameters())
        assert all(torch.equal(p, average[name]) and not p.requires_grad for name, p in expert.named_parameters())
        moved = [name for name, p in own.named_parameters() if not torch.equal(p, average[name])]
        assert moved and (rank is None or all("lora" in name for name in moved))
        if rank:  # one backbone
            assert expert.mid.base_layer.weight is own.mid.base_layer.weight is nets.teacher.net.mid.weight
        assert nets.student.phase == (2, 4) and [nets.student.denoiser_of_call(i).net is own for i in range(4)] == [
            0,
            0,
            1,
            1,
        ]
        batch, one = {"c": {"label": self.C}}, first.nets
        for draw in (Draw(0, i, "student", torch.arange(16)) for i in range(4)):  # with both exits of the phase
            steps = 1 + draw.index("steps", 2)
            assert method.sample(nets, batch, draw).requires_grad
            into = one.generate(batch, draw, 1, one.student.times[1]) if steps == 2 else 2.5 * draw.normal("z", (16, 2))
            pred = one.student.denoiser(into, times(steps - 1, one), batch["c"])
            want = one.teacher.path.diffuse(pred.x0, pred.eps, times(2, one))
            torch.testing.assert_close(method.sample(one, batch, draw), want, rtol=1e-5, atol=1e-5)


def times(i, nets):
    return torch.full((16,), nets.student.times[i], dtype=F64)


def test_mistakes():
    teacher = tiny(EDM(), "edm")
    for config in (StudentConfig(steps=3, phases=2), StudentConfig(steps=1, phases=2)):
        with pytest.raises(ValueError, match="equally many calls"):
            build(DMD2(gan=0, gan_fake=0), teacher, (2,), student=config)
    with pytest.raises(ValueError, match="walk"):
        PhasedDMD(walk=True)
