"""rCM: sCM with weight 0, sCM plus lambda DMD2 otherwise; where both are at their optimum, no gradient is left."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, Gaussian, consistent, exact, problem
from tiny import tiny

from distill.draw import Draw
from distill.methods import DMD2, RCM, SCM
from distill.roles import Nets, build
from distill.student import Student
from distill.times import LogNormal
from distill.trainer import TrainConfig, train

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
def test_switched_off_and_before_its_start_it_is_scm(schedule):
    """Bit for bit."""
    nets = nets_of(schedule)
    on = RCM(**SHARED, dmd_times=DMD_TIMES)
    for step in (2, 7):
        want = loss_of(SCM(**SHARED), nets, step)[0]
        assert all(torch.equal(a, b) for a, b in zip(loss_of(replace(on, dmd=0.0), nets, step)[0], want))
        same = [torch.equal(a, b) for a, b in zip(loss_of(on, nets, step)[0], want)]
        assert all(same) if step < 4 else not any(same)
    assert replace(on, dmd=0.0).roles == () and on.roles == ("fake",)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_is_the_sum_of_both(schedule):
    """sCM on the images plus 2 lambda times DMD2 on the student's samples, and DMD2's fake score."""
    nets, method = nets_of(schedule), RCM(**SHARED, dmd=0.3, dmd_times=DMD_TIMES)
    dmd2 = DMD2(1.5, 5, 0, 0, times=DMD_TIMES, fake_times=DMD_TIMES, reduction="sum")
    parts = [loss_of(m, nets, 7)[0] for m in (SCM(**SHARED), dmd2)]
    for ours, a, b in zip(loss_of(method, nets, 7)[0], *parts):
        torch.testing.assert_close(ours, a + 2 * 0.3 * b)
    draw, batch = turn("fake", 7), batch_of()
    x = dmd2.sample(nets, batch, draw)
    assert torch.equal(loss_of(method, nets, 7, "fake")[0][0], dmd2.fake_loss(x, nets, batch, draw)[0])


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
