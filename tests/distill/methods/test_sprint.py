"""SANA-Sprint: a flow on TrigFlow, sCM with a hinge GAN in the teacher's features, guidance told, the last time."""

import math
from dataclasses import fields, replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, Whitened, consistent, exact, problem
from tiny import tiny

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import Flow, Trig
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed
from distill.methods import LADD, SCM, Sprint
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train
from distill.training.step import set_trainable

METHOD = Sprint(taps=("first", "mid"), warmup=2)
FLOW, TRIG = Flow(), Trig()


def as_scm(method):
    return SCM(**{f.name: getattr(method, f.name) for f in fields(SCM)})


def nets_like(method, dtype=torch.float32, schedule="flow", **student):
    torch.manual_seed(0)
    teacher = tiny(SCHEDULES[schedule], {"flow": "flow", "edm": "edm"}.get(schedule, "v"), dtype=dtype, classes=3)
    nets = build(method, teacher, (2,), {"label": torch.tensor([0])}, StudentConfig(**student))
    if nets.disc is not None:
        nets.disc.to(dtype)
    return nets


def data(draw):
    label = draw.integers("real", 3)
    real = torch.stack([label - 1.0, 0.3 * draw.normal("pixels", (len(label),))], dim=1)
    return {"c": {"label": draw.integers("label", 3)}, "real": real, "real_c": {"label": label}}


@pytest.mark.level(1, "Sprint")
class TestFlowOnTrig:
    """The exact transformation (section 3.1): no weight changes, and nothing is lost on the way."""

    net = staticmethod(lambda: tiny(FLOW, "flow"))

    @pytest.mark.parametrize(
        "theta, s, scale",
        [(0.1, 0.091186, 0.913377), (0.5, 0.353296, 0.736915), (1.0, 0.608979, 0.723708), (1.5, 0.933781, 0.936126)],
    )
    def test_golden_levels(self, theta, s, scale):
        """The flow's time is sin / (sin + cos), its input sqrt(s^2 + (1 - s)^2) times TrigFlow's."""
        x, t, factor = (
            self.net()
            .on_schedule(TRIG)
            ._native(torch.ones(1, 1, dtype=F64), torch.tensor([theta * 2 / math.pi]).double())
        )
        assert float(t) == pytest.approx(s, abs=1e-6)
        assert float(factor) == float(x) == pytest.approx(scale, abs=1e-6)

    def test_velocity(self):
        """sigma_d F of the paper, ((1 - 2s) x + (1 - 2s + 2s^2) v) / sqrt(s^2 + (1 - s)^2) of the flow's x and v."""
        denoiser, y = self.net(), torch.randn(64, 2, dtype=F64)
        theta = torch.linspace(0.001, math.pi / 2 - 0.001, 64, dtype=F64)[:, None]
        s = theta.sin() / (theta.sin() + theta.cos())
        norm = (s**2 + (1 - s) ** 2).sqrt()
        v = denoiser(norm * y, s[:, 0]).out
        want = ((1 - 2 * s) * norm * y + (1 - 2 * s + 2 * s**2) * v) / norm
        t = theta[:, 0] * 2 / math.pi
        got = METHOD.velocity(denoiser.on_schedule(TRIG)(y, t), t)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    def test_round_trip(self):
        """A network of TrigFlow's velocity, made of the flow by on(), is that flow again when it is read as one."""
        flow = self.net()

        class Velocity(torch.nn.Module):
            def forward(self, y, theta):
                return METHOD.velocity(flow.on_schedule(TRIG)(y, theta * 2 / math.pi), theta * 2 / math.pi)

        x, s = torch.randn(64, 2, dtype=F64), torch.linspace(0, 1, 64, dtype=F64)
        again = Denoiser(Velocity(), TRIG, "v").on_schedule(FLOW)(
            x, s
        )  # cos eps - sin x0 is the v of alpha = cos, sigma = sin
        there = flow(x, s)
        torch.testing.assert_close(again.flow, there.out, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(again.x0, there.x0, rtol=1e-13, atol=1e-13)
        assert torch.equal(flow.on_schedule(TRIG).on_schedule(FLOW)(x, s).out, there.out)

    def test_halved_latents_say_the_same(self):
        """The authors' frame, latents times sigma_d = 1/2 in Trig(1/2), has our angles, velocities and tangents."""
        path, half, x, eps = TRIG, Trig(0.5), *torch.randn(2, 8, 2, dtype=F64)
        draw = Draw(0, 0, "student", torch.arange(8))
        theirs = half.time(torch.exp(0.2 + 1.6 * draw.normal("t", (8,)).double()))  # arctan(e^tau / sigma_d)
        ours = path.time(FLOW.ratio(METHOD.times(draw, "t", 8, FLOW)))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(path.diffuse(x, eps, ours), half.diffuse(0.5 * x, eps, theirs) / 0.5)
        g = torch.randn(8, 2, dtype=F64)
        size = lambda g: g.norm(dim=1, keepdim=True)
        torch.testing.assert_close(g / (size(g) + METHOD.c), 0.5 * g / (size(0.5 * g) + 0.1))


@pytest.mark.level(1, "Sprint")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samples_of_an_exact_student_have_the_teachers_law(schedule):
    """From any level: mean and covariance of x are those at the schedule's end: nothing is left to tell apart."""
    law, path = problem(2)[0], SCHEDULES[schedule]
    alpha, sigma = path.coefficients(torch.zeros(1, dtype=F64))
    want = alpha**2 * law.cov + sigma**2 * torch.eye(2, dtype=F64)
    for t in (0.2, 0.5, 0.9):
        draw = Whitened(64, 2, ("y", "z"))
        real = law.mean + draw.columns["y"] @ torch.linalg.cholesky(law.cov).T
        gap = {}
        for student in (consistent, exact):
            nets = Nets(exact(law, path), Student(student(law, path)), (2,))
            x = replace(METHOD, guidance=1.0, times=Fixed(t), last=0.0).sample(nets, {"real": real}, draw)
            gap[student] = float((x.T.cov(correction=0) - want).abs().max())
        assert gap[consistent] < 1e-10 and gap[exact] > 1e-4, gap
        torch.testing.assert_close(x.mean(0), law.mean, rtol=1e-9, atol=1e-9)


class TestMaxTime:
    """The share of the student's calls that begin a generation."""

    @pytest.mark.parametrize("p", (0.0, 0.5, 0.7, 1.0))
    def test_share(self, p):
        method = replace(METHOD, last=p)
        nets, draw, heard = nets_like(method, steps=2), Draw(0, 0, "student", torch.arange(2000)), []
        batch = data(draw)
        nets.student.denoiser.net.register_forward_pre_hook(
            lambda net, args, kwargs: heard.append((args[0], args[1])), with_kwargs=True
        )
        method.sample(nets, batch, draw)
        ((x, native),) = heard
        end = native == 1000
        assert float(end.float().mean()) == pytest.approx(p, abs=0.03)
        assert torch.equal(x[end], draw.normal("z", (2000, 2))[end])
        s = (native[~end] / 1000).double()
        if len(s):  # the others have sCM's own law: its median is a ratio of 2 e^0.2
            assert float((s / (1 - s)).median()) == pytest.approx(2 * math.exp(0.2), rel=0.15)

    def test_the_sample_of_the_end_is_the_generators(self):
        method = replace(METHOD, last=1.0, guidance=1.0)
        nets, draw = nets_like(method, sigma=20.0), Draw(0, 0, "student", torch.arange(6))
        batch = data(draw)
        x = method.sample(nets, batch, draw)
        assert torch.equal(x, nets.generate({"c": batch["real_c"]}, draw)) and batch["c"] is batch["real_c"]


def test_guidance_is_told_to_the_student_alone():
    """One drawn from [4, 5], the same in sCM and in the GAN's call; the teacher's features are of c alone."""
    nets, draw, heard = nets_like(METHOD), Draw(0, 0, "student", torch.arange(8)), {"teacher": [], "student": []}
    for role, net in (("teacher", nets.teacher.net), ("student", nets.student.denoiser.net)):
        net.register_forward_pre_hook(
            lambda m, args, kwargs, role=role: heard[role].append(kwargs.get("guidance")), with_kwargs=True
        )
    batch = data(draw)
    METHOD.student_loss(METHOD.sample(nets, batch, draw), nets, batch, draw)
    w = 4 + draw.uniform("guidance", (8,))
    assert len(heard["student"]) == 2 and all(torch.equal(told, w) for told in heard["student"])
    assert heard["teacher"] == [None, None]


def losses(method, steps=3, **student):
    nets = nets_like(method, **student)
    cfg = TrainConfig(max_train_steps=steps, train_batch_size=8, learning_rate=1e-3)
    logs = [dict(state.logs) for state in train(method, nets, data, cfg, Accelerator(cpu=True))]
    return nets, logs


def test_without_the_gan_it_is_scm():
    """Bit for bit: losses and weights of three steps; with it, other weights."""
    off, logs = losses(replace(METHOD, gan=0.0))
    base, want = losses(as_scm(METHOD))
    assert off.modules().keys() == base.modules().keys() == {"student"}
    assert [a["student/loss"] for a in logs] == [b["student/loss"] for b in want]
    weights = lambda nets: torch.cat([p.flatten() for p in nets.student.denoiser.net.parameters()])
    assert torch.equal(weights(off), weights(base))
    on, logs = losses(METHOD)
    assert not torch.equal(weights(on), weights(base)) and logs[0].keys() > want[0].keys()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_is_scms_and_half_of_ladds(schedule):
    nets, draw = nets_like(METHOD, F64, schedule), Draw(0, 1, "student", torch.arange(8))
    batch = data(draw)
    batch["real"] = batch["real"].double()
    params = [*nets.student.denoiser.net.parameters()]

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    x = METHOD.sample(nets, batch, draw)
    got = gradient(METHOD.student_loss(x, nets, batch, draw)[0])
    scm = gradient(as_scm(METHOD).student_loss(batch["real"], nets, batch, draw)[0])
    ladd = LADD(METHOD.taps, gan_times=METHOD.gan_times)
    gan = gradient(ladd.student_loss(METHOD.sample(nets, batch, draw), nets, batch, draw)[0])
    torch.testing.assert_close(got, scm + 0.5 * gan, rtol=1e-10, atol=1e-12)
    assert gan.norm() > 1e-3 and scm.norm() > 1e-3


def test_who_moves():
    """Student and heads take turns, one each a step; gradients of one never reach the other or the teacher."""
    assert [(u.player, u.every, u.reuse) for u in METHOD.updates()] == [("student", 1, False), ("fake", 1, True)]
    nets, draw = nets_like(METHOD), Draw(0, 0, "student", torch.arange(8))
    players = {"student": [*nets.student.denoiser.net.parameters()], "fake": [*nets.disc.parameters()]}
    nets.teacher.net.requires_grad_(False)
    batch = data(draw)
    for update in METHOD.updates():
        set_trainable(players, update.player)
        update.loss(METHOD.sample(nets, batch, draw), nets, batch, draw)[0].backward()
        for name, params in players.items():
            assert any(p.grad is not None and p.grad.any() for p in params) == (name == update.player)
            for p in params:
                p.grad = None
