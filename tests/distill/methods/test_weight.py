"""The learned weight of sCM's loss: its optimum, its part of the gradient, and what the prior does to it."""

from dataclasses import replace

import pytest
import torch
from gaussian import F64
from tiny import tiny

from distill.diffusion.schedule import Trig
from distill.diffusion.student import Student
from distill.methods import RCM, SCM, Sprint
from distill.networks.adaptive_weight import LogVariance, weigh
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build

LEVELS = torch.logspace(-2, 2, 40, dtype=F64)


def error(s):
    """Mean squared errors m(s) [B, 3] that rise and fall with the level."""
    return (1 + 5 * s)[:, None] / (1 + s[:, None] ** 2) * torch.tensor([0.5, 1.0, 1.5], dtype=F64)


@pytest.mark.parametrize("prior", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_optimum(prior, reduction):
    """It finds l(s) = log( v m(s) ) at every level; the loss there is 1 + the mean of l."""
    net, m = LogVariance().double(), error(LEVELS)
    assert torch.equal(net(LEVELS), torch.zeros(40, dtype=F64))  # at the start the loss is unweighted
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=400, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = weigh(m, LEVELS, prior, net, reduction)[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    want = (m.mean(1) if reduction == "mean" else m.sum(1)) / (LEVELS if prior else 1)
    with torch.no_grad():
        assert (net(LEVELS) - want.log()).abs().max() < 2e-2
        torch.testing.assert_close(weigh(m, LEVELS, prior, net, reduction)[0], 1 + want.log().mean(), rtol=0, atol=1e-3)


class Optimum(torch.nn.Module):
    """log( v m ) itself."""

    def __init__(self, m, prior):
        super().__init__()
        self.m, self.prior = m, prior

    def forward(self, s):
        return (self.m / s if self.prior else self.m).log()


def test_at_the_optimum_the_prior_is_nothing():
    """There the gradient to the errors is 1 / E m(s), whatever v is."""
    found = []
    for prior in (False, True):
        m = error(LEVELS).requires_grad_()
        loss, logs = weigh(m, LEVELS, prior, Optimum(m.detach().mean(1), prior), "mean")
        found.append(torch.autograd.grad(loss, m)[0])
        assert torch.equal(logs["log_variance"], Optimum(m.detach().mean(1), prior)(LEVELS).mean())
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], (1 / error(LEVELS).mean(1) / 120)[:, None].expand(40, 3), rtol=1e-12, atol=0)


def test_levels_without_end():
    """At noise alone and at data alone l is finite, and so is the loss without the prior."""
    net = LogVariance()
    net.linear.weight.data.normal_()
    s = torch.tensor([0.0, 1e-9, 1.0, 1e9, float("inf")], dtype=F64)
    assert torch.isfinite(net(s)).all() and float(net(s)[0]) == float(net(s)[1])


def test_of_scm():
    """sCM's loss is v e^-l m + l, and m is 1 where tangents are normalised; the gradient reaches the student and l.

    An untrained l leaves the plain loss.
    """
    make = lambda seed: tiny(Trig(0.5), "v", seed)
    nets, x = Nets(make(0), Student(make(1), (1.0,)), (2,)), torch.randn(8, 2, dtype=F64)
    draw = Draw(0, 4, "student", torch.arange(8))
    of = lambda method: method.student_loss(x, nets, {}, draw)
    plain = SCM(warmup=0)
    nets.weight = LogVariance().double()
    assert torch.equal(of(replace(plain, adaptive=True))[0], of(plain)[0])
    s = Trig(0.5).ratio(Trig(0.5).time(nets.teacher.schedule.ratio(plain.times(draw, "t", 8, nets.teacher.schedule))))
    nets.weight.linear.weight.data.normal_()
    one = replace(plain, adaptive=True, prior=True, c=0.0, norm="vector", reduction="sum")
    loss, _ = of(one)
    l = nets.weight(s)
    torch.testing.assert_close(loss, ((-l).exp() / s + l).mean(), rtol=1e-5, atol=1e-6)  # |g / |g||^2 is 1
    student, weight = nets.student.denoiser.net, nets.weight.linear.weight
    grads = torch.autograd.grad(loss, [*student.parameters(), weight], allow_unused=True)
    waves = torch.autograd.grad(nets.weight(s), weight, (1 - (-l).exp() / s).detach() / 8)[0]
    torch.testing.assert_close(grads[-1], waves, rtol=1e-5, atol=1e-6)
    assert any(g is not None and g.abs().max() > 0 for g in grads[:-1])


def test_built():
    teacher = tiny(Trig(), "v", dtype=torch.float32)
    assert build(SCM(), teacher, (2,)).weight is None and SCM().roles == ()
    assert isinstance(build(SCM(adaptive=True), teacher, (2,)).weight, LogVariance)
    assert RCM(adaptive=True).roles == ("weight", "fake") and Sprint(adaptive=True).roles == ("weight", "disc")
