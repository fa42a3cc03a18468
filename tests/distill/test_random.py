"""Random numbers by name, and the laws of time that are made of them."""

import math

import numpy as np
import pytest
import torch
from gaussian import F64, SCHEDULES

from distill.diffusion.schedule import EDM, VP, Flow
from distill.diffusion.times import Fixed, Grid, Karras, LogitNormal, LogNormal, ShiftedTimes, Uniform, shift
from distill.random import Draw, threefry

near = lambda got, want, tol=1e-12: torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def draws(n=64, seed=0, step=0, player="student"):
    return Draw(seed, step, player, torch.arange(n))


class TestThreefry:
    @pytest.mark.parametrize(
        "key, counter, want",
        (
            ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
            ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
            ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
        ),
    )
    @pytest.mark.parametrize("library", (torch.tensor, np.array))
    def test_known_answers(self, key, counter, want, library):
        """Random123's published vectors, by either library."""
        signed = lambda n: n - (1 << 32) if n >> 31 else n
        int32 = {torch.tensor: torch.int32, np.array: np.int32}[library]
        (a,), (b,) = threefry(key, *(library([signed(n)], dtype=int32) for n in counter))
        assert (int(a) & 0xFFFFFFFF, int(b) & 0xFFFFFFFF) == want


class TestDraw:
    SHAPE = (3, 2)

    def everything(self, draw):
        B = len(draw.samples)
        return draw.normal("eps", (B, *self.SHAPE)), draw.uniform("t", (B,)), draw.integers("label", 10)

    @pytest.mark.parametrize("sizes", ((64,), (32, 32), (1, 5, 58), (16,) * 4))
    def test_independent_of_the_split(self, sizes):
        """However the global batch is cut into micro-batches or processes, a sample has its numbers."""
        want = self.everything(draws())
        parts = [self.everything(Draw(0, 0, "student", s)) for s in torch.arange(64).split(sizes)]
        for whole, pieces in zip(want, zip(*parts)):
            assert torch.equal(whole, torch.cat(pieces))

    def test_repeatable_and_without_state(self):
        draw = draws()
        first = self.everything(draw)
        torch.randn(5)
        for a, b in zip(first, self.everything(draw)):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("change", (dict(seed=1), dict(step=1), dict(player="fake")))
    def test_depends_on(self, change):
        for a, b in zip(self.everything(draws()), self.everything(draws(**change))):
            assert not torch.equal(a, b)
        x, y = (d.normal("eps", (64, 500)).flatten() for d in (draws(), draws(**change)))
        assert abs(torch.corrcoef(torch.stack((x, y)))[0, 1]) < 0.02  # 3.6 standard errors

    def test_names_differ(self):
        x, y = (draws().normal(name, (64, 500)).flatten() for name in ("eps", "gan_eps"))
        assert abs(torch.corrcoef(torch.stack((x, y)))[0, 1]) < 0.02

    def test_samples_and_elements_differ(self):
        x = draws().normal("eps", (64, 100))
        assert len(x.unique()) > 6390

    def test_shape_only_groups_elements(self):
        """The same number for the same element, however the sample is shaped."""
        assert torch.equal(draws().normal("eps", (64, 6)).reshape(64, 3, 2), draws().normal("eps", (64, 3, 2)))

    def test_uniform(self):
        u = draws(1000).uniform("t", (1000, 200)).double()
        assert u.min() >= 0 and u.max() < 1
        for k in (1, 2, 3, 4):
            near((u**k).mean(), torch.tensor(1 / (k + 1), dtype=F64), 3e-3)
        count = torch.histc(u, 100, 0, 1)
        assert ((count - 2000) / 2000**0.5).abs().max() < 4.5

    def test_normal(self):
        x = draws(1000).normal("eps", (1000, 200)).double()
        for k, want in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
            near((x**k).mean(), torch.tensor(float(want), dtype=F64), 0.02 * max(want, 0.5))
        cdf = torch.linspace(-3, 3, 25, dtype=F64)
        share = (x.flatten()[:, None] < cdf).double().mean(0)
        near(share, (1 + torch.erf(cdf / math.sqrt(2))) / 2, 4e-3)
        assert x.isfinite().all() and 4 < x.abs().max() < 6.2

    def test_the_least_uniform_word_is_a_finite_normal(self, monkeypatch):
        zero = torch.zeros(2, 3, dtype=torch.int32)
        for word in (zero, zero - 1):
            monkeypatch.setattr(Draw, "_words", lambda self, name, shape, word=word: (word, zero))
            x = draws(2).normal("eps", (2, 3))
            assert x.isfinite().all() and x.abs().max() < 6.2

    def test_integers(self):
        n = draws(20_000).integers("label", 10)
        assert n.dtype == torch.int64 and n.min() == 0 and n.max() == 9
        assert (torch.bincount(n) - 2000).abs().max() < 200

    def test_index_is_everyones(self):
        """One choice per step and name: the same for both players, for any samples, on any process."""
        picks = [
            [Draw(3, step, player, samples).index("steps", 4) for step in range(400)]
            for player in ("student", "fake")
            for samples in (torch.arange(4), torch.arange(60, 64))
        ]
        assert all(p == picks[0] for p in picks)
        counts = torch.bincount(torch.tensor(picks[0]), minlength=4)
        assert counts.min() > 70
        assert [Draw(3, k, "student", torch.arange(4)).index("other", 4) for k in range(400)] != picks[0]
        assert draws().index("steps", 1) == 0

    def test_wrong_batch(self):
        with pytest.raises(ValueError, match=r"draw 'eps' of shape \(3, 2\) in a micro-batch of 64 samples"):
            draws().normal("eps", (3, 2))


class TestTimes:
    N = 20_000

    def sample(self, law, schedule=None):
        t = law(draws(self.N), "t", self.N, schedule or EDM())
        assert t.dtype == F64 and t.shape == (self.N,) and t.min() >= 0 and t.max() <= 1
        return t

    def quantiles(self, x):
        return x.quantile(torch.tensor((0.05, 0.25, 0.5, 0.75, 0.95), dtype=F64))

    NORMAL = torch.tensor((-1.6449, -0.6745, 0.0, 0.6745, 1.6449), dtype=F64)

    def test_uniform(self):
        t = self.sample(Uniform(0.02, 0.98))
        near(self.quantiles(t), 0.02 + 0.96 * torch.tensor((0.05, 0.25, 0.5, 0.75, 0.95), dtype=F64), 0.02)
        assert t.min() >= 0.02 and t.max() < 0.98

    def test_grid_includes_both_ends(self):
        """DMD2's 20..980 and SiD-LSG's 20..979 of 1000: whole indices of the table, each equally often."""
        table = VP.scaled_linear()
        for low, high in ((20, 980), (20, 979), (0, 999), (1, 3)):
            n = table.native(self.sample(Grid(1000, low, high), table))
            assert torch.equal(n, n.round()) and n.min() == low and n.max() == high
        assert (torch.bincount((n - 1).long()) / self.N - 1 / 3).abs().max() < 0.02

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_laws_of_noise_mean_the_same_on_every_schedule(self, schedule):
        """LogNormal and Karras are laws of sigma / alpha, within what the schedule has."""
        path = SCHEDULES[schedule]
        ratio = path.ratio(self.sample(LogNormal(-0.4, 0.6), path))
        near(self.quantiles(ratio.log()), -0.4 + 0.6 * self.NORMAL, 0.03)
        for law in (LogNormal(-0.4, 0.6), Karras(0.1, 10.0)):
            near(path.ratio(self.sample(law, path)), EDM().ratio(self.sample(law)), 1e-6)  # VP rounds to whole indices

    def test_karras(self):
        """SiD's: EDM's own grid, uniform in [0, .8] of its 1000 levels; sigma at .8 is 24.4."""
        t = self.sample(Karras(0.002, 24.4083))
        near(self.quantiles(t), 0.8 * torch.tensor((0.05, 0.25, 0.5, 0.75, 0.95), dtype=F64), 0.015)
        assert t.max() < 0.8 + 1e-6

    def test_logit_normal(self):
        for mean, std in ((0.0, 1.0), (math.log(2), 1.6)):
            t = self.sample(LogitNormal(mean, std))
            near(self.quantiles((t / (1 - t)).log()), mean + std * self.NORMAL, 0.07)

    def test_shift_multiplies_flow_noise(self):
        t = torch.linspace(0.01, 0.99, 99, dtype=F64)
        near(Flow().ratio(shift(t, 3.0)), 3 * Flow().ratio(t))
        near(shift(t, 1.0), t)
        near(self.sample(ShiftedTimes(Uniform(0, 1), 3.0)), shift(self.sample(Uniform(0, 1)), 3.0))
        near(shift(torch.tensor((0.0, 1.0), dtype=F64), 3.0), torch.tensor((0.0, 1.0), dtype=F64))

    def test_fixed(self):
        assert (self.sample(Fixed(0.3)) == 0.3).all()

    @pytest.mark.parametrize(
        "law", (Uniform(), Grid(), LogNormal(), Karras(), LogitNormal(), ShiftedTimes(Uniform(), 3.0)), ids=repr
    )
    def test_independent_of_the_split(self, law):
        parts = [law(Draw(0, 0, "student", s), "t", len(s), EDM()) for s in torch.arange(64).split(16)]
        assert torch.equal(torch.cat(parts), law(draws(), "t", 64, EDM()))
