"""The moving average and its half-life in images."""

import pytest
import torch
from torch import nn

from distill.networks.ema import EMA, exponent

near = lambda got, want, tol=1e-12: torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def moved(ema, net, steps, batch, start=0):
    """The network jumps from 0 to 1 and stays: how far the average has come."""
    with torch.no_grad():
        net.weight.fill_(1.0)
    for k in range(steps):
        ema.update(net, batch, start + k * batch)
    return float(ema.net.weight)


def fresh(half_life, ramp=None):
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    return EMA(net, half_life, ramp), net


@pytest.mark.parametrize("batch", (1, 10, 50, 100))
def test_half_life(batch):
    """After `half_life` images, however many at a time, half of the way is done."""
    ema, net = fresh(100.0)
    assert moved(ema, net, 100 // batch, batch) == pytest.approx(0.5, rel=1e-12)
    assert moved(ema, net, 100 // batch, batch) == pytest.approx(0.75, rel=1e-12)


def test_off():
    ema, net = fresh(0.0)
    assert moved(ema, net, 1, 1) == 1.0 and ema.net is net


def test_ramp():
    """At most 5 % of the images seen: nothing is kept of the first step, and the start is forgotten."""
    ema, net = fresh(1e6, ramp=0.05)
    assert moved(ema, net, 1, 64, start=0) == 1.0
    ema, net = fresh(1e6, ramp=0.05)
    assert moved(ema, net, 1, 64, start=1280) == pytest.approx(0.5, rel=1e-12)
    ema, net = fresh(64.0, ramp=0.05)
    assert moved(ema, net, 1, 64, start=10**9) == pytest.approx(0.5, rel=1e-12)  # the half-life caps the ramp


@pytest.mark.parametrize(("width", "gamma"), ((0.05, 16.97), (0.10, 6.94), (0.01, 96.99)))
def test_power_average(width, gamma):
    """Weights of EDM2's power average: n^(gamma + 1) - (n - 1)^(gamma + 1) of update n, gamma as FastGen lists it."""
    assert exponent(width) == pytest.approx(gamma, abs=5e-3)
    net, seed = nn.Linear(1, 1, bias=False).double(), torch.Generator().manual_seed(0)
    ema, values = EMA(net, 0.0, width=width), torch.randn(30, dtype=torch.float64, generator=seed)
    for n, value in enumerate(values):
        with torch.no_grad():
            net.weight.fill_(value)
        ema.update(net, 64, 64 * n, n)
    powers = torch.arange(31, dtype=torch.float64) ** (exponent(width) + 1)
    assert float(ema.net.weight) == pytest.approx(float(powers.diff() @ values / powers[-1]), rel=1e-9)
    n = torch.arange(1, 100_001, dtype=torch.float64)
    weights = (n / 1e5) ** exponent(width)
    mean = (weights * n).sum() / weights.sum()
    spread = ((weights * (n - mean) ** 2).sum() / weights.sum()).sqrt() / 1e5
    assert float(spread) == pytest.approx(width, rel=1e-3)


def test_average_is_a_frozen_copy():
    net = nn.Linear(3, 3)
    ema = EMA(net, 10.0)
    assert not ema.net.training and not any(p.requires_grad for p in ema.net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert not {id(p) for p in ema.net.parameters()} & {id(p) for p in net.parameters()}


def test_buffers_are_copied():
    net = nn.BatchNorm1d(3)
    ema = EMA(net, 1e9)
    net(torch.randn(16, 3) + 5)
    ema.update(net, 16, 0)
    near(ema.net.running_mean, net.running_mean, 0)
    assert int(ema.net.num_batches_tracked) == 1


def test_wrong_half_life():
    with pytest.raises(ValueError, match=r"ema half_life is -1 images; it must be 0 \(off\) or more"):
        EMA(nn.Linear(1, 1), -1)
