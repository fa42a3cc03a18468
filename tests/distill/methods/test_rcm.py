"""rCM: sCM with weight 0, sCM plus lambda DMD2 otherwise; where both are at their optimum, no gradient is left."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, Gaussian, consistent, exact, problem
from tiny import tiny

from distill.diffusion.student import Student
from distill.diffusion.times import LogNormal
from distill.methods import DMD2, RCM, SCM
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import TrainConfig
from distill.training.loop import train

B, CLASSES = 8, 3
SHARED = {"guidance": 1.5, "sigma_d": 0.5, "warmup": 4, "norm": "vector", "reduction": "sum", "times": LogNormal()}
DMD_TIMES = LogNormal(0.0, 1.0)


class Doubles(Draw):
    def normal(self, name, shape):
        return super().normal(name, shape).double()


def turn(player="student", step=0):
    return Doubles(0, step, player, torch.arange(B))


def nets_of(schedule="edm"):
    make = lambda seed: tiny(SCHEDULES[schedule], "edm" if schedule == "edm" else "v", seed, classes=CLASSES)
    return Nets(make(0), Student(make(1), (0.9, 0.5)), (2,), make(2))


def batch_of():
    label = {"label": torch.arange(B) % CLASSES}
    return {"c": label, "real": turn().normal("real", (B, 2)), "real_c": label}


def loss_of(method, nets, step, player="student"):
    """The loss, its gradient to the player, logs."""
    batch, draw = batch_of(), turn(player, step)
    x = method.sample(nets, batch, draw)
    loss, logs = next(u.loss for u in method.updates() if u.player == player)(x, nets, batch, draw)
    net = nets.student.denoiser.net if player == "student" else nets.fake.net
    return [loss, *torch.autograd.grad(loss, [*net.parameters()], allow_unused=True)], logs


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_switched_off_it_is_scm(schedule):
    """Once the warm-up is over; before it dF/dt counts in full, and DMD has not begun."""
    nets = nets_of(schedule)
    on = RCM(**SHARED, dmd_times=DMD_TIMES)
    off = replace(on, dmd=0.0)
    close = lambda a, b: all(torch.allclose(x, y, rtol=1e-9, atol=1e-9) for x, y in zip(a, b, strict=True))
    assert close(loss_of(off, nets, 7)[0], loss_of(SCM(**SHARED), nets, 7)[0])
    assert not close(loss_of(off, nets, 2)[0], loss_of(SCM(**SHARED), nets, 2)[0])
    assert not close(loss_of(on, nets, 7)[0], loss_of(off, nets, 7)[0])
    assert all(torch.equal(a, b) for a, b in zip(loss_of(on, nets, 2)[0], loss_of(off, nets, 2)[0]))
    assert off.roles == () and on.roles == ("fake",)
    assert replace(on, adaptive=True).roles == ("weight", "fake")


def test_warm_up():
    """-cos sqrt(1 - r^2 sin^2) (F - dx/dt) - r cos sin x_t - cos sin dF/dt, and sCM's where r is 1."""
    lag, x, slope = (turn().normal(name, (B, 2)) for name in ("lag", "x", "slope"))
    angle = torch.linspace(0.05, 1.57, B, dtype=F64)[:, None]
    for r in (0.0, 0.3, 1.0):
        want = -angle.cos() * (1 - r**2 * angle.sin() ** 2).sqrt() * lag - r * x - slope
        got = RCM().tangent(lag, x, slope, angle.cos(), angle.sin(), r)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, SCM().tangent(lag, x, slope, angle.cos(), angle.sin(), 1.0))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sigma_d", (0.5, 1.0))
def test_fake_score(schedule, sigma_d):
    """|x0 error|^2 / sin^2 of TrigFlow's angle, summed over elements; at t = 0 it is finite."""
    nets, batch, draw = nets_of(schedule), batch_of(), turn("fake")
    method = RCM(sigma_d=sigma_d, dmd_times=DMD_TIMES)
    x = draw.normal("x", (B, 2))
    loss, _ = method.fake_loss(x, nets, batch, draw)
    path = nets.fake.path
    t = DMD_TIMES(draw, "t", B, path)
    alpha, sigma = (a[:, None] for a in path.coefficients(t))
    x0 = nets.fake(path.diffuse(x, draw.normal("eps", (B, 2)), t), t, batch["c"]).x0
    sin = sigma / (sigma**2 + (sigma_d * alpha) ** 2).sqrt()
    torch.testing.assert_close(loss, ((x0 - x) / sin).square().sum() / B, rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_is_the_sum_of_both(schedule):
    """sCM on the images plus 2 lambda times DMD2 on the student's samples; the fake's samples are DMD2's."""
    nets, method = nets_of(schedule), RCM(**SHARED, dmd=0.3, dmd_times=DMD_TIMES)
    dmd2 = DMD2(1.5, 5, 0, 0, times=DMD_TIMES, fake_times=DMD_TIMES, reduction="sum")
    parts = [loss_of(m, nets, 7)[0] for m in (SCM(**SHARED), dmd2)]
    for ours, a, b in zip(loss_of(method, nets, 7)[0], *parts):
        torch.testing.assert_close(ours, a + 2 * 0.3 * b)
    draw, batch = turn("fake", 7), batch_of()
    x = dmd2.sample(nets, batch, draw)
    assert torch.equal(loss_of(method, nets, 7, "fake")[0][0], method.fake_loss(x, nets, batch, draw)[0])


def test_turns():
    """Alone the student moves at each step; once DMD has begun at every fourth, and the fake at each."""
    teacher, label = tiny(SCHEDULES["edm"], "edm", dtype=torch.float32, classes=CLASSES), torch.arange(B) % CLASSES
    method = RCM(**SHARED | {"guidance": 1.0, "warmup": 3}, dmd_times=DMD_TIMES)
    nets = build(method, teacher, (2,), {"label": label[:1]})
    data = lambda draw: {"c": {"label": label}, "real": torch.ones(B, 2), "real_c": {"label": label}}
    cfg = TrainConfig(max_train_steps=9, train_batch_size=B)
    turns = [
        {name.split("/")[0][0] for name in state.logs}
        for state in train(method, nets, data, cfg, Accelerator(cpu=True))
    ]
    assert " ".join("".join(sorted(turn, reverse=True)) for turn in turns) == "s s s f sf f f f sf"
    assert [u.every for u in RCM(dmd=0.0).updates()] == [1]


@pytest.mark.level(1, "RCM")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_at_rest(schedule):
    """At the exact consistency function, with a fake score that is the teacher's; another fake score moves it on."""
    law, path = problem(2)[0], SCHEDULES[schedule]
    student, real = consistent(law, path, "v"), torch.randn(B, 2, dtype=F64)
    other = Gaussian(law.mean + 1, law.cov)
    method = RCM(guidance=1.0, sigma_d=0.5, warmup=0, normalise=False, dmd_times=DMD_TIMES)

    def push(fake):
        nets = Nets(exact(law, path, "v"), Student(student, (0.5,)), (2,), fake)
        draw = turn()
        x = method.sample(nets, {}, draw).detach().requires_grad_()
        loss, logs = method.student_loss(x, nets, {"real": real}, draw)
        (slope,) = torch.autograd.grad(loss, x)
        return float(logs["tangent"]), float(slope.abs().max())

    tangent, slope = push(exact(law, path, "v"))
    assert tangent < 1e-12 and slope < 1e-12
    assert push(exact(other, path, "v"))[1] > 1e-4
