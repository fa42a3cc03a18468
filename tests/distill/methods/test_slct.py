"""sLCT: each of its terms off, it is CT to the bit; the coupling is the best, c and the denoising loss as written."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from gaussian import F64, SCHEDULES
from tiny import tiny

from distill.diffusion.curriculum import ICTCurriculum
from distill.diffusion.student import Student
from distill.losses import cauchy_norm
from distill.methods import CT, SLCT
from distill.methods.slct import couple_noise
from distill.random import Draw
from distill.roles import Nets

B = 8
OFF = {"adaptive": False, "coupled": False, "diffusion": 0.0}


def turn(step=0):
    return Draw(0, step, "student", torch.arange(B))


def nets_of(schedule="edm"):
    make = lambda seed: tiny(SCHEDULES[schedule], "edm" if schedule == "edm" else "v", seed)
    return Nets(make(0), Student(make(1), (0.5,)), (2,))


def loss_of(method, nets, step=0):
    """The loss and its gradient to the student."""
    loss, _ = method.student_loss(turn().normal("real", (B, 2)).double(), nets, {}, turn(step))
    return loss, *torch.autograd.grad(loss, [*nets.student.denoiser.net.parameters()])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("distance", ("cauchy", "huber"))
def test_switched_off_it_is_ct(distance, schedule):
    """Bit for bit; each term alone makes it another."""
    nets = nets_of(schedule)
    want = loss_of(CT(ICTCurriculum(), distance, 0.3), nets)
    off = SLCT(ICTCurriculum(), distance, 0.3, **OFF)
    assert all(torch.equal(a, b) for a, b in zip(loss_of(off, nets), want))
    for on in ({"adaptive": True} if distance == "cauchy" else {}, {"coupled": True}, {"diffusion": 1.0}):
        if on:
            assert not torch.equal(loss_of(replace(off, **on, early=1.0), nets)[1], want[1]), on


@pytest.mark.level(1, "SLCT")
def test_coupling_is_the_best_of_all():
    """Of all orders of six; on the line, noise in the order of the images."""
    x, eps = torch.randn(6, 3, 2, dtype=F64), torch.randn(6, 3, 2, dtype=F64)
    cost = lambda order: float((x - order).square().sum())
    assert cost(couple_noise(x, eps)) == pytest.approx(
        min(cost(eps[list(p)]) for p in itertools.permutations(range(6)))
    )
    assert cost(couple_noise(x, eps)) < cost(eps)
    x, eps = torch.randn(64, 1), torch.randn(64, 1)
    assert torch.equal(couple_noise(x, eps)[x[:, 0].argsort()], eps.sort(0).values)


@pytest.mark.level(1, "SLCT")
@pytest.mark.parametrize("prompts", (False, True))
def test_noise_tells_nothing_of_the_condition(prompts):
    """Of each condition the noises are those that it had, in the best order among them; one prompt each keeps its."""
    x, eps, label = torch.randn(24, 2, dtype=F64), torch.randn(24, 2, dtype=F64), torch.arange(24) % 3
    x = x + 5 * label[:, None]
    c = {"text": torch.randn(3, 4, 2)[label], "pooled": torch.randn(3, 4)[label]} if prompts else {"label": label}
    found = couple_noise(x, eps, c)
    for k in range(3):
        assert torch.equal(found[label == k], couple_noise(x[label == k], eps[label == k]))
    assert not torch.equal(found, couple_noise(x, eps)) and not torch.equal(found, eps)
    assert torch.equal(couple_noise(x, eps, {"text": torch.randn(24, 4, 2)}), eps)


@pytest.mark.level(1, "SLCT")
@pytest.mark.parametrize("step, N", ((0, 10), (399_999, 1280)))
def test_c_falls_with_the_grid(step, N):
    """c = exp(-1.18 ln N - 0.72): 0.0322 at first, 1.05e-4 in the end."""
    delta = torch.randn(B, 5, dtype=F64)
    c = {10: 0.0322, 1280: 1.05e-4}[N]
    assert math.exp(-0.72) * N**-1.18 == pytest.approx(c, rel=5e-3)
    want = cauchy_norm(delta, math.exp(-0.72) * N**-1.18)
    torch.testing.assert_close(SLCT().sample_distance(delta, turn(step)), want)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_denoising_at_the_low_levels(schedule):
    """lambda |f(x_t, t) - x|^2 for the first quarter of the grid, in addition."""
    nets, path, draw = nets_of(schedule), SCHEDULES[schedule], turn()
    off = SLCT(ICTCurriculum(mean=-3.0), "huber", 0.3, **OFF)
    on = replace(off, diffusion=2.0)
    x, eps, net = draw.normal("real", (B, 2)).double(), draw.normal("eps", (B, 2)).double(), nets.student.denoiser
    t, _, _ = off.curriculum(draw, B, path)
    s = path.ratio(t) ** (1 / 7)
    low = (s - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7)) <= 0.25
    assert 0 < low.sum() < B
    error = (net(path.diffuse(x, eps, t), t).x0 - x).square().sum(1)
    want = loss_of(off, nets)[0] + 2 * (low * error).mean()
    torch.testing.assert_close(loss_of(on, nets)[0], want)
