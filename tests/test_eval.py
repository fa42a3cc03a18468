"""Evaluation: exact distances, the behaviour of each metric, images that do not depend on the batch, the page."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scipy.stats import t as student_t

from distill.data import digits
from eval import images as folders
from eval.features import extractor, shifted
from eval.generate import generate, generator, run, student_sampler, teacher_sampler
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


@pytest.mark.parametrize("channels", [1, 3])
def test_images_survive_the_folder(tmp_path, channels):
    levels = torch.arange(256, dtype=torch.uint8).repeat(3 * channels).reshape(3, channels, 16, 16)
    manifest = folders.write(tmp_path / "a", folders.restore(levels), [4, 5, 6], seed=7)
    images, labels, read = folders.read(tmp_path / "a")
    assert folders.quantize(images).equal(levels) and labels.tolist() == [4, 5, 6]
    assert read == manifest and read["seed"] == 7 and read["n"] == 3
    assert folders.read(tmp_path / "a", first=2)[0].equal(images[:2])
    assert folders.quantize(torch.tensor([-3.0, -1.0, 0.002, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_bad_folders_are_one_clear_error(tmp_path):
    x = torch.zeros(3, 1, 8, 8)

    def fresh(name, **meta):
        folders.write(tmp_path / name, x, **meta)
        return tmp_path / name

    def fails(folder, match):
        with pytest.raises(ValueError, match=match):
            folders.read(folder)

    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no .png image")
    fails(tmp_path / "absent", "no folder")
    mixed = fresh("mixed")
    Image.new("L", (9, 8)).save(mixed / "000001.png")
    fails(mixed, "000001.png is 9 x 8 .* 000000.png is 8 x 8")
    corrupt = fresh("corrupt")
    (corrupt / "000002.png").write_bytes((corrupt / "000002.png").read_bytes()[:40])
    fails(corrupt, "000002.png is not a readable image")
    short = fresh("short")
    (short / "000002.png").unlink()
    fails(short, "holds 2 images, its manifest says 3")
    edited = fresh("edited")
    Image.new("L", (8, 8), 9).save(edited / "000001.png")
    fails(edited, "not those that its manifest describes")
    with pytest.raises(ValueError, match="not empty"):
        folders.write(edited, x)
    folders.write(edited, x, overwrite=True)
    assert len(folders.read(edited)[0]) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="left alone"):
        folders.write(tmp_path / "mine", x, overwrite=True)
    with pytest.raises(ValueError, match="image 1 holds NaN"):
        folders.write(tmp_path / "nan", torch.stack([x[0], x[0] * math.nan]))
    assert not (tmp_path / "nan").exists() and not list(tmp_path.glob(".*"))


def tiny_unet():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), num_class_embeds=11,
        add_attention=False,
    )  # fmt: skip


def fake_teacher():
    from distill.denoiser import Denoiser
    from distill.schedule import EDM

    def call(net, x, t, c):
        return net(x, t, class_labels=c["labels"]).sample

    denoiser = Denoiser(tiny_unet().eval(), EDM(), "edm", call, null={"labels": torch.tensor([10])})
    return SimpleNamespace(
        denoiser=denoiser, shape=(1, 8, 8), encode=lambda labels: {"labels": labels}, decode=lambda x: x
    )


def test_noise_belongs_to_seed_and_index():
    draws = [torch.randn(4, generator=generator(s, i)) for s, i in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert draws[0].equal(draws[1])
    assert not any(draws[0].equal(other) for other in draws[2:]) and not draws[2].equal(draws[3])


def same_pictures(a, b):
    """Equal up to the rounding of the network's sums (torch picks its kernels by batch): at most one 8-bit level."""
    levels = (folders.quantize(a).int() - folders.quantize(b).int()).abs()
    assert levels.max() <= 1 and levels.double().mean() < 0.01


@pytest.mark.parametrize("guidance, nfe", [(1.0, 5), (2.0, 10)])
def test_teacher_images_do_not_depend_on_the_batch(guidance, nfe):
    sampler = teacher_sampler(fake_teacher(), steps=3, guidance=guidance)
    whole, labels = run(sampler, 11, seed=3, batch=11)
    assert sampler.nfe == nfe and labels.tolist() == [*range(10), 0]
    for batch in (1, 4):
        parts, _ = run(sampler, 11, seed=3, batch=batch)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
        same_pictures(parts, whole)
    other, _ = run(sampler, 11, seed=4, batch=11)
    assert (other - whole).abs().max() > 0.1


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A random two-step student as it is exported: a plain ConsistencyModelPipeline and a distill.json."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    folder = tmp_path_factory.mktemp("models") / "student"
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.0, sigma_max=2.5, sigma_data=0.75)
    ConsistencyModelPipeline(tiny_unet(), scheduler).save_pretrained(folder)
    about = {"student": True, "times": [1.0, 0.5], "timesteps": [20, 10], "steps": 2}
    (folder / "distill.json").write_text(json.dumps(about))
    return folder


def test_student_images_do_not_depend_on_the_batch(student, tmp_path):
    made = [generate(student, tmp_path / str(b), n=11, seed=3, batch=b) for b in (11, 4, 1)]
    assert made[0]["nfe"] == 2 and made[0]["student"] and made[0]["labels"] == [*range(10), 0]
    whole, *parts = (folders.read(tmp_path / str(b))[0] for b in (11, 4, 1))
    same_pictures(parts[0], whole)
    same_pictures(parts[1], whole)
    one = generate(student, tmp_path / "one", n=11, seed=3, steps=1)
    assert one["nfe"] == 1 and one["hash"] != made[0]["hash"]


def test_student_and_teacher_start_from_the_same_noise():
    seen = []

    def pipe(generator, **how):
        from diffusers.utils.torch_utils import randn_tensor

        seen.append(randn_tensor((3, 1, 8, 8), generator=generator, device=torch.device("cpu")))
        return SimpleNamespace(images=torch.zeros(3, 1, 8, 8))

    pipe.set_progress_bar_config = lambda **_: None
    run(student_sampler(pipe), 3, seed=5)
    expected = torch.stack([torch.randn(1, 8, 8, generator=generator(5, i)) for i in range(3)])
    assert seen[0].equal(expected)


def test_generate_repeats_reuses_and_refuses(student, tmp_path):
    out = tmp_path / "out"
    first = generate(student, out, n=11, seed=1)
    written = (out / "000000.png").stat().st_mtime_ns
    assert generate(student, out, n=11, seed=1) == first
    assert (out / "000000.png").stat().st_mtime_ns == written  # the same request: nothing was done
    with pytest.raises(ValueError, match="not empty"):
        generate(student, out, n=11, seed=2)
    assert generate(student, out, n=11, seed=2, overwrite=True)["hash"] != first["hash"]
    for wrong, match in (
        ({"guidance": 2.0}, "guidance is 2.0"),
        ({"steps": 3}, "made for 2"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"n": 0}, "n is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            generate(student, tmp_path / "new", **({"n": 2} | wrong))
    with pytest.raises(ValueError, match="no model folder"):
        generate(tmp_path / "nothing", tmp_path / "new")
    assert not (tmp_path / "new").exists()


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


@pytest.mark.parametrize("stage", ["generate", "score"])
def test_help_is_light(stage):
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_module('eval.{stage}', run_name='__main__')\n"
    )
    code += "except SystemExit: pass\nprint([m for m in ('diffusers', 'transformers', 'matplotlib', 'sklearn', 'scipy')"
    code += " if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "[]" and "--out" in done.stdout, done.stderr


def test_a_mistake_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "eval.generate", "--model", "absent", "--out", "x"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: there is no model folder absent")
    assert "Traceback" not in done.stderr
