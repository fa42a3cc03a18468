"""A law from its noisiest times on: its clusters, what each stage draws, and that the last stage is the law itself."""

from itertools import combinations

import pytest
import torch
from gaussian import F64, SCHEDULES
from scipy.stats import chisquare

from distill.configuration import Config, parse
from distill.data import Digits
from distill.diffusion import times
from distill.diffusion.times import (
    Clip,
    Fixed,
    Grid,
    Karras,
    LogitNormal,
    LogNormal,
    ShiftedTimes,
    StagedTimes,
    Uniform,
    clusters,
    probability_below,
)
from distill.methods import Denoise, SiD
from distill.random import Draw

LAWS = (
    Uniform(0.0, 1.0),
    Grid(),
    LogNormal(-0.4, 0.8),
    Karras(0.1, 10.0),
    LogitNormal(),
    ShiftedTimes(Uniform(), 3.0),
)
B = 4000


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A tenth of the tasks: enough to see where the clusters are."""
    clusters.cache_clear()
    monkeypatch.setattr(times, "TASKS", 100)
    yield
    clusters.cache_clear()


def turn(step=0, n=B):
    return Draw(0, step, "fake", torch.arange(n))


def at(law, share, path):
    """t below which a law has this share."""
    return law(times.RemappedDraw(turn(n=1), lambda u: torch.full_like(u, share)), "t", 1, path)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("law", (LAWS[0], LAWS[2], LAWS[3]), ids=repr)
def test_clusters(law, schedule, monkeypatch):
    """Of all ways to cut the tasks in three, the one with the least distance of log(sigma / alpha) from medians."""
    monkeypatch.setattr(times, "TASKS", 15)
    path = SCHEDULES[schedule]
    y = [float(path.ratio(at(law, (k + 0.5) / 15, path)).log()) for k in range(15)]

    def distance(cuts):
        parts = [torch.tensor(y[a:b], dtype=F64) for a, b in zip((0, *cuts), (*cuts, 15))]
        return sum(float((part - part.quantile(0.5)).abs().sum()) for part in parts)

    best = min(combinations(range(1, 15), 2), key=distance)
    found = clusters.__wrapped__(law, 3, path)
    assert found == (0.0, *(cut / 15 for cut in best), 1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_stages(law, schedule):
    """Stage n: nothing below its cluster's edge, above it as the law is; from the last stage on the law to the bit."""
    path, staged = SCHEDULES[schedule], StagedTimes(law, N=4, every=10)
    edges, base = clusters(law, 4, path), law(turn(), "t", B, path)
    assert 0 == edges[0] < edges[1] < edges[2] < edges[3] < edges[4] == 1
    for n in (1, 2, 3):
        first, last = (staged(turn(step), "t", B, path) for step in (10 * n - 10, 10 * n - 1))
        low, high = at(law, edges[4 - n], path), at(law, 1 - 2.0**-24, path)
        assert float(first.min()) >= float(low) - 1e-6 and float(first.max()) <= float(high) + 1e-6
        assert float(first.min()) < float(at(law, edges[4 - n] + 0.01, path)) + 1e-6  # and down to it
        assert not torch.equal(first, last)  # other numbers of the same law
        cuts = torch.stack([at(law, edges[4 - n] + (1 - edges[4 - n]) * k / 5, path)[0] for k in range(1, 5)])
        if not isinstance(law, Grid):  # its steps have no fifths
            assert chisquare(torch.bucketize(first, cuts).bincount(minlength=5).numpy()).pvalue > 1e-3
    for step in (30, 31, 10_000):
        assert torch.equal(staged(turn(step), "t", B, path), law(turn(step), "t", B, path))
    counts = torch.bucketize(base, torch.cat([at(law, q, path) for q in edges[1:4]]), right=True).bincount()
    assert chisquare(counts.numpy(), B * torch.tensor(edges, dtype=F64).diff().numpy()).pvalue > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_stage_is_the_law(schedule):
    path = SCHEDULES[schedule]
    for law in (*LAWS, Fixed(0.3)):
        assert torch.equal(StagedTimes(law, N=1)(turn(), "t", B, path), law(turn(), "t", B, path))
    assert torch.equal(StagedTimes(Fixed(0.3))(turn(), "t", B, path), Fixed(0.3)(turn(), "t", B, path))


def test_of_a_recipe():
    """As any field of times, alone or within another law; its own fields and the law's are flags."""
    config = Config(Denoise(times=StagedTimes(LogNormal())), Digits())
    flags = "--method.times.N 5 --method.times.every 7 --method.times.law.mean -1".split()
    assert parse(config, flags).method.times == StagedTimes(LogNormal(-1.0), 5, 7)
    method = SiD(fake_times=ShiftedTimes(StagedTimes(Uniform(), 2, 10)))
    t = method.fake_times(turn(), "t", B, SCHEDULES["flow"])
    assert float(t.min()) > float(method.fake_times(turn(10), "t", B, SCHEDULES["flow"]).median()) * 0.9
    with pytest.raises(ValueError, match="N is 1001; a law has at most 100 clusters"):
        StagedTimes(Uniform(), 1001)


@pytest.mark.parametrize("schedule", ("vp", "flow"))
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_share(law, schedule):
    """As many draws are at most t as the law has there; a law of steps has them all up to a step's own time."""
    path = SCHEDULES[schedule]
    drawn = law(turn(), "t", B, path)
    for t in (float(drawn.quantile(0.3)), 0.0, 1.0):
        found = probability_below(law, t, path)
        assert abs(found - float((drawn <= t).double().mean())) < 4 * 0.5 / B**0.5
        if found < 1:
            assert times.quantile(law, found, path) > t


def test_clip():
    """Self-Forcing: 5 u / (1 + 4 u) kept in [.02, .98]: the last .093 of u are at .98, the first .004 at .02."""
    t = Clip(ShiftedTimes(Uniform(0.0, 1.0), 5.0), 0.02, 0.98)(turn(n=50_000), "t", 50_000, SCHEDULES["flow"])
    assert t.min() == 0.02 and t.max() == 0.98
    assert float((t == 0.98).double().mean()) == pytest.approx(1 - 0.98 / (5 - 4 * 0.98), abs=5e-3)
    assert float((t <= 0.5).double().mean()) == pytest.approx(0.5 / (5 - 4 * 0.5), abs=5e-3)
    with pytest.raises(ValueError, match="times from low = 0.9 to high = 0.1"):
        Clip(Uniform(), 0.9, 0.1)
