"""TCD: off it is LCD; its ends are uniform; where the ODE is a line, one prediction leads to all of it."""

from dataclasses import replace

import pytest
import torch
from gaussian import F64, SCHEDULES, Gaussian, consistent, exact, problem
from tiny import tiny

from distill.diffusion.solver import STEPS
from distill.diffusion.student import Student
from distill.losses import huber
from distill.method import Requirement
from distill.methods import LCD, TCD
from distill.random import Draw
from distill.roles import Nets

B = 16
OFF = {"guidance": 1.0, "target_ema": 0.0}


def turn(n=B):
    return Draw(0, 0, "student", torch.arange(n))


def nets_of(schedule):
    make = lambda seed: tiny(SCHEDULES[schedule], "edm" if schedule == "edm" else "v", seed)
    return Nets(make(0), Student(make(1), (0.5,)), (2,))


def loss_of(method, nets):
    """The loss and its gradient to the student."""
    loss, _ = method.student_loss(turn().normal("real", (B, 2)).double(), nets, {}, turn())
    return loss, *torch.autograd.grad(loss, [*nets.student.denoiser.net.parameters()])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_reach_it_is_lcd(schedule):
    """Bit for bit, loss and gradient, if f leads to the first level (data, but for a table); with it, another loss."""

    class Ends(LCD):
        def end_index(self, i, nets, draw):
            return torch.zeros_like(i)

    nets = nets_of(schedule)
    want = loss_of(Ends(N=10, **OFF), nets)
    if schedule.startswith(("flow", "trig")):
        for ours, theirs in zip(want, loss_of(LCD(N=10, **OFF), nets)):
            torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(loss_of(TCD(N=10, reach=0.0, **OFF), nets), want))
    assert not any(torch.equal(a, b) for a, b in zip(loss_of(TCD(N=10, **OFF), nets), want))


def test_a_guidance_that_the_student_is_not_told():
    """LCM-LoRA's script: w of [4, 16] for each sample, and a student under its text alone."""
    teacher, C = tiny(SCHEDULES["vp"], "eps", classes=3), {"label": torch.arange(B) % 3}
    nets = Nets(teacher, Student(tiny(SCHEDULES["vp"], "eps", 1, classes=3), (1.0,)), (2,))
    method, draw = LCD(N=10, guidance=(4.0, 16.0), target_ema=0.0, embed=False), turn()
    assert Requirement.GUIDANCE_EMBEDDING not in method.requirements
    assert Requirement.GUIDANCE_EMBEDDING in replace(method, embed=True).requirements
    x, w = draw.normal("real", (B, 2)).double(), draw.uniform("guidance", (B,)).double() * 12 + 4
    found, target, _ = method.solutions(x, nets, {"real_c": C}, draw)
    for i in range(3):
        fixed, batch = replace(method, guidance=float(w[i])), {"real_c": {"label": C["label"][i : i + 1]}}
        want = fixed.solutions(x[i : i + 1], nets, batch, Draw(0, 0, "student", torch.tensor([i])))
        torch.testing.assert_close(torch.stack([found[i], target[i]]), torch.cat(want[:2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reach, last", ((1.0, 6), (0.5, 3)))
def test_ends_are_uniform(reach, last):
    """0, 1 / N, ... up to s itself, or a share of it."""
    n = 7000
    ends = TCD(N=10, reach=reach).end_index(torch.full((n,), 6.0, dtype=F64), None, turn(n))
    share = torch.bincount(ends.round().long()) / n
    assert len(share) == last + 1 and (share - 1 / (last + 1)).abs().max() < 0.02  # four standard deviations
    assert torch.equal(ends, ends.round())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_by_hand(schedule):
    """d( f(x_t, t, e), f(x_s, s, e) ), the target without gradient; x_s itself where e = s."""
    method, nets, path, draw = TCD(N=3, **OFF), nets_of(schedule), SCHEDULES[schedule], turn()
    x, eps, net = draw.normal("real", (B, 2)).double(), draw.normal("eps", (B, 2)).double(), nets.student.denoiser
    n = (draw.uniform("t", (B,)).double() * 3).floor()
    e = (draw.uniform("end", (B,)).double() * (n + 1)).floor() / 3
    t, s = (n + 1) / 3, n / 3
    assert (e == s).any() and (e < s).any() and (e == 0).any() and ((e > 0) & (e < s)).any()
    x_t = path.diffuse(x, eps, t)
    x_s = STEPS["ddim"](nets.teacher, x_t, t, s)
    led = []
    for y, u in ((x_t, t), (x_s, s)):
        pred = net(y, u)
        (a, b) = (c[:, None] for c in path.coefficients(e))
        led.append(a * pred.x0 + b * pred.eps)
    target = torch.where((e == s)[:, None], x_s, led[1]).detach()
    want = huber(led[0] - target, 1e-3).mean()
    got = loss_of(method, nets)
    torch.testing.assert_close(got[0], want)
    for a, b in zip(got[1:], torch.autograd.grad(want, [*net.net.parameters()])):
        torch.testing.assert_close(a, b)


@pytest.mark.level(1, "TCD")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_data_of_one_point(schedule):
    """All trajectories are lines in sigma / alpha: the teacher leads to each of their points, other students do not."""
    point, path = Gaussian(torch.tensor([0.4, -1.0], dtype=F64), torch.zeros(2, 2, dtype=F64)), SCHEDULES[schedule]
    x, method = point.mean.expand(B, 2), TCD(N=8, huber_c=None, **OFF)

    def residual(student):
        nets = Nets(exact(point, path), Student(student, (1.0,)), (2,))
        draw = turn()
        draw.normal = lambda name, shape: Draw.normal(draw, name, shape).double()
        draw.uniform = lambda name, shape: Draw.uniform(draw, name, shape) * 7 / 8 + 1 / 8  # s > 0: x_0 has noise left
        return float(method.student_loss(x, nets, {}, draw)[1]["delta"]) ** 0.5

    assert residual(exact(point, path)) < 1e-12
    assert residual(consistent(problem(2)[0], path)) > 1e-2
    assert replace(method, reach=0.0).end_index(torch.full((B,), 4.0, dtype=F64), None, turn()).abs().max() == 0
