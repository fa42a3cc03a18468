"""Evaluation: exact distances, the behaviour of each metric, images that do not depend on the batch, the page."""

import math
import subprocess
import sys

import pytest
import torch
from scipy.stats import t as student_t

from distill.data import digits
from eval import images as folders
from eval.features import extractor, shifted
from eval.metrics import accuracy, frechet, mean_ci, precision_recall, ratio_ci
from eval.score import score, scores


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Trains the classifier once for this file, away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        extractor.cache_clear()
        yield extractor()
    extractor.cache_clear()


def whitened(n, d, seed=0):
    """[n, d] with mean exactly 0 and covariance exactly 1."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T


def test_frechet_is_the_closed_form_of_gaussians():
    """Commuting covariances: |dmu|^2 + |A^1/2 - B^1/2|^2; one-sided ones: A = 1, tr(1 + B - 2 B^1/2) with any B."""
    d = 16
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    s, r = torch.linspace(0.1, 3, d, dtype=torch.float64), torch.linspace(2, 0.5, d, dtype=torch.float64)
    mu = torch.linspace(-1, 1, d, dtype=torch.float64)
    a, b = whitened(200, d) * s @ rotation.T, whitened(300, d, 1) * r @ rotation.T + mu
    assert frechet(a, b) == pytest.approx((mu.square().sum() + (s - r).square().sum()).item(), rel=1e-10)
    root = torch.randn(d, d, dtype=torch.float64)
    b = whitened(300, d, 1) @ root.T
    expected = d + root.square().sum() - 2 * torch.linalg.svdvals(root).sum()
    assert frechet(whitened(200, d), b) == pytest.approx(expected.item(), rel=1e-10)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)


def test_frechet_of_equal_sets_is_zero():
    x = torch.randn(100, 64) * torch.linspace(0, 5, 64)  # one constant feature: a singular covariance
    assert frechet(x, x.flip(0)) == pytest.approx(0, abs=1e-6)


def test_bad_features_are_refused():
    x = torch.randn(100, 64)
    with pytest.raises(ValueError, match="n = 64 samples of 64 features; at least 65"):
        frechet(x[:64], x)
    with pytest.raises(ValueError, match="second features of sample 7 are NaN"):
        frechet(x, x.index_fill(0, torch.tensor([7]), math.nan))
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(x, x[:3])


def test_precision_and_recall_see_different_faults():
    """Two far modes: dropping one halves recall, not precision; noise that leaves the modes lowers precision."""

    def modes(n, seed):
        g = torch.Generator().manual_seed(seed)
        return torch.randn(n, 4, generator=g) + 40 * (torch.arange(n) % 2)[:, None]

    real = modes(600, 0)
    precision, recall, n = precision_recall(real, modes(600, 1))
    assert n == 600 and precision > 0.85 and recall > 0.85
    dropped = precision_recall(real, modes(1200, 1)[::2])
    assert dropped[0] > 0.85 and dropped[1] == pytest.approx(0.5, abs=0.06)
    astray = modes(600, 1)
    astray[:300] += torch.randn(300, 4) * 15
    assert precision_recall(real, astray)[0] < 0.6
    assert precision_recall(real, modes(900, 1))[2] == 600
    assert precision_recall(real, real) == (1.0, 1.0, 600)


def test_precision_and_recall_by_hand():
    """On a line, k = 1: real balls are [-1, 2], [4, 6]; fakes 1.5, 3 and 5.5 with radii 1.5, 1.5, 2.5."""
    real, fake = torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([[1.5], [3.0], [5.5], [20.0]])
    assert precision_recall(real, fake, k=1) == (0.5, 1.0, 4)


def test_intervals():
    values = [1.0, 2.0, 4.0]
    half = student_t.ppf(0.975, 2) * torch.tensor(values).std().item() / 3**0.5
    found = mean_ci(values)
    assert found == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half, 3), rel=1e-6)
    assert mean_ci([[0.5, 1.5], [2.0], [3.0, 5.0]]) == pytest.approx(found)  # a run counts once, by its mean
    with pytest.raises(ValueError, match="at least 2 finite values"):
        mean_ci([1.0])
    same = ratio_ci([2.0, 4.0, 8.0], [1.0, 2.0, 4.0], paired=True)
    assert same == pytest.approx((2.0, 2.0, 2.0, 3))
    assert ratio_ci([2.0, 2.0], [4.0, 4.0]) == pytest.approx((0.5, 0.5, 0.5, 2))
    with pytest.raises(ValueError, match="positive"):
        ratio_ci([1.0, -1.0], [1.0, 1.0])


def test_the_ratio_interval_covers():
    """Over 400 draws of 3 against 5 runs the 95 % interval holds the true ratio in 92 to 98.5 %."""
    g = torch.Generator().manual_seed(0)
    top, bottom = (m * (1 + 0.08 * torch.randn(400, n, generator=g)) for m, n in ((9.0, 3), (12.0, 5)))
    found = [ratio_ci(a.tolist(), b.tolist()) for a, b in zip(top, bottom)]
    assert 0.92 <= sum(low <= 0.75 <= high for _, low, high, _ in found) / 400 <= 0.985


def test_classifier(cache, tmp_path):
    """At least 97 % of the held-out digits; the cache gives the same weights back."""
    images, labels = digits("heldout")
    features, logits = cache(images)
    assert features.shape == (597, 64) and features.dtype == torch.float64
    assert accuracy(logits, labels) == pytest.approx(cache.accuracy) and cache.accuracy >= 0.97
    assert features.min() < 0  # before the ReLU
    hash = cache.hash
    extractor.cache_clear()
    assert extractor().hash == hash  # from the file
    with pytest.raises(ValueError, match="image 3 holds NaN"):
        cache(images.index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(ValueError, match=r"\[2, 3, 8, 8\]"):
        cache(torch.zeros(2, 3, 8, 8))


def test_shift_moves_by_whole_pixels():
    x = torch.randn(2, 1, 4, 4)
    out = shifted(x, torch.tensor([[1, 0], [0, -1]]))
    assert (out[0, 0, 0] == -1).all() and out[0, 0, 1:].equal(x[0, 0, :-1])
    assert (out[1, 0, :, -1] == -1).all() and out[1, 0, :, :-1].equal(x[1, 0, :, 1:])


def test_real_digits_score_at_the_floor(cache, tmp_path):
    """The held-out digits as a "model": distance 0 to themselves, the floor to the training split."""
    images, labels = digits("heldout")
    folders.write(tmp_path / "real", images, labels, name="real", nfe=1)
    row = score(tmp_path / "real")
    assert row["fd_heldout"] == pytest.approx(0, abs=1e-6)
    assert row["fd_train"] == pytest.approx(row["floor_fd_heldout"], rel=1e-9)
    assert row["accuracy"] == pytest.approx(cache.accuracy) and row["n"] == row["n_manifold"] == 597
    assert row["precision"] > 0.8 and row["recall"] > 0.8
    folders.write(tmp_path / "noise", torch.randn(300, 1, 8, 8), torch.arange(300) % 10)
    noise = score(tmp_path / "noise")
    assert noise["fd_heldout"] > 5 * row["floor_fd_heldout"] and noise["precision"] < 0.2 and noise["accuracy"] < 0.3
    few = images[torch.randint(0, 597, (300,))] * 0 + images[labels == 3][:1]
    folders.write(tmp_path / "few", few + 0.01 * torch.randn_like(few))
    assert score(tmp_path / "few")["recall"] < 0.1 and score(tmp_path / "few")["accuracy"] is None
    with pytest.raises(ValueError, match="no folder"):
        scores((tmp_path / "real", tmp_path / "absent"))
    folders.write(tmp_path / "small", images[:20])
    with pytest.raises(ValueError, match="small: first set has n = 20"):
        score(tmp_path / "small")


@pytest.mark.parametrize("stage", ["score"])
def test_help_is_light(stage):
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_module('eval.{stage}', run_name='__main__')\n"
    )
    code += "except SystemExit: pass\nprint([m for m in ('diffusers', 'transformers', 'matplotlib', 'sklearn', 'scipy')"
    code += " if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "[]" and "--out" in done.stdout, done.stderr
