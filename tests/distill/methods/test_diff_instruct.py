"""Diff-Instruct: its gradient is that of the integral KL, with its weight, on every schedule."""

from dataclasses import dataclass, replace

import pytest
import torch
from gaussian import F64, RATIOS, SCHEDULES, Whitened, exact, kl, kl_gradient, nets_of, problem, student_gradient
from tiny import tiny

from distill.diffusion.schedule import KINDS
from distill.diffusion.times import Fixed, TimeDistribution
from distill.methods import DMD2, VSD, DiffInstruct
from distill.random import Draw
from distill.training.build import build


@dataclass(frozen=True)
class Levels(TimeDistribution):
    """Every time of a list for an equal block of the batch."""

    t: tuple

    def __call__(self, draw, name, B, schedule):
        return torch.tensor(self.t, dtype=F64).repeat_interleave(B // len(self.t))


def near(got, want, rtol=1e-10):
    assert (got - want).norm() <= rtol * want.norm(), f"off by {(got - want).norm() / want.norm():.3g}"


@pytest.mark.level(1, "DiffInstruct")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weight", ("one", "ratio"))
def test_one_level(weight, schedule):
    """The KL's gradient itself, or (sigma / alpha)^2 of it, for every kind of network."""
    (teacher, line), path = problem(3), SCHEDULES[schedule]
    for t in path.time(torch.tensor(RATIOS, dtype=F64)):
        s = float(path.ratio(t))
        for kind in KINDS:
            nets = nets_of(line, exact(teacher, path, kind), fake=exact(line.law, path, kind))
            _, *got = student_gradient(DiffInstruct(weight, times=Fixed(float(t))), nets, Whitened(256, 3))
            for one, want in zip(got, kl_gradient(teacher, line.A.detach(), line.b.detach(), s)):
                near(one, want * (1.0 if weight == "one" else s**2))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weight", ("one", "ratio"))
def test_integral(weight, schedule):
    """Over several levels it is the derivative of the sum that the paper minimises."""
    (teacher, line), path = problem(2), SCHEDULES[schedule]
    t = path.time(torch.tensor((0.2, *RATIOS), dtype=F64))
    method = DiffInstruct(weight, times=Levels(tuple(t.tolist())))
    nets = nets_of(line, exact(teacher, path), fake=exact(line.law, path))
    _, *got = student_gradient(method, nets, Whitened(32, 2, blocks=len(t)))
    A, b = line.A.detach().requires_grad_(), line.b.detach().requires_grad_()
    levels = [float(s) for s in path.ratio(t)]
    ikl = sum((1.0 if weight == "one" else s**2) * kl(teacher, A, b, s) for s in levels) / len(levels)
    for one, want in zip(got, torch.autograd.grad(ikl, (A, b))):
        near(one, want)


def nets(schedule="edm"):
    teacher = tiny(SCHEDULES[schedule], "edm" if schedule == "edm" else "v", dtype=torch.float32, classes=3)
    found = build(DiffInstruct(), teacher, (2,), {"label": torch.tensor([0])})
    for i, net in enumerate((found.student.denoiser.net, found.fake.net)):
        torch.manual_seed(i)
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return found


def turn(method, nets, player):
    """Loss and gradients of one turn."""
    draw, batch = Draw(0, 3, player, torch.arange(8)), {"c": {"label": torch.arange(8) % 3}}
    net = {"student": nets.student.denoiser.net, "fake": nets.fake.net}[player]
    x = method.sample(nets, batch, draw)
    x = x if player == "student" else x.detach()
    loss, _ = getattr(method, f"{player}_loss")(x, nets, batch, draw)
    return [loss, *torch.autograd.grad(loss, net.parameters())]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_the_codes_weight_it_is_dmd2_without_its_additions(schedule):
    """No normaliser, no GAN: bit for bit; the KL's own weight moves the gradient."""
    base, roles = DMD2(gan=0, gan_fake=0, normalise=False, reduction="sum"), nets(schedule)
    method = DiffInstruct(times=base.times, fake_times=base.fake_times)
    for player in ("student", "fake"):
        assert all(torch.equal(a, b) for a, b in zip(turn(method, roles, player), turn(base, roles, player)))
    one = turn(replace(method, weight="one"), roles, "student")
    assert not torch.allclose(one[1], turn(method, roles, "student")[1])


def test_fake_turn():
    """VSD's, without guidance: plain denoising of the student's samples; it comes first, on samples of its own."""
    method, roles = DiffInstruct(), nets()
    base = VSD(guidance=1.0, fake_times=method.fake_times, reduction="sum")
    assert all(torch.equal(a, b) for a, b in zip(turn(method, roles, "fake"), turn(base, roles, "fake")))
    updates = DiffInstruct(fake_steps=3).updates()
    assert [(u.player, u.every, u.reuse) for u in updates] == [("fake", 1, False), ("student", 3, False)]


def test_no_gradient_through_the_scores():
    roles, draw = nets(), Draw(0, 0, "student", torch.arange(8))
    batch = {"c": {"label": torch.arange(8) % 3}}
    roles.teacher.net.requires_grad_(True)
    x = DiffInstruct().sample(roles, batch, draw)
    DiffInstruct().student_loss(x, roles, batch, draw)[0].backward()
    assert all(p.grad is None for net in (roles.teacher.net, roles.fake.net) for p in net.parameters())
    assert all(p.grad is not None for p in roles.student.denoiser.net.parameters())


def test_an_unknown_weight():
    with pytest.raises(ValueError, match="weight is 'sigma'; it must be 'ratio'"):
        DiffInstruct("sigma")
