"""Metrics: closed forms, agreement with clean-fid, torch-fidelity and torchmetrics, behaviour, intervals, rows."""

import itertools
import json
import math
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.stats import t as student_t
from test_security import png

from distill.data import digits
from eval.cli import PartialFailure
from eval.features import extraction as feature_module
from eval.features.digits import classifier
from eval.features.extraction import features
from eval.features.extractors import load
from eval.figures import Folder, score_folder
from eval.figures import read_statistics as statistics_of
from eval.images import images as folders
from eval.leaderboard.tables import validate_rows
from eval.metrics import hallucination
from eval.metrics.classifier import accuracy, inception_score
from eval.metrics.diversity import diversity, pair_diversity, vendi
from eval.metrics.frechet import fid, frechet, moments
from eval.metrics.intervals import HalvingIntervals, Score, Z, intervals_overlap, mean_ci, proportion, ratio_ci
from eval.metrics.kernel import cmmd, kid
from eval.metrics.lookup import find_metric
from eval.metrics.neighbours import manifold
from eval.metrics.registry import METRICS
from eval.protocols import PROTOCOLS
from eval.score import score_folders
from pipelines.families import tiny


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory, digits_network):
    """The digits' network, and features away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        load.cache_clear()
        yield
    load.cache_clear()


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
    with pytest.raises(ValueError, match="n = 64 samples of 64 features; at least 65"):
        fid(x[:64], x)
    bad = x.index_fill(0, torch.tensor([7]), math.nan)
    for call in (frechet, lambda a, b: fid(b, a), lambda a, b: kid(b, a), lambda a, b: manifold(b, a)):
        with pytest.raises(ValueError, match="features of sample 7 are NaN"):
            call(x, bad)
    with pytest.raises(ValueError, match="features of sample 7 are NaN"):
        vendi(bad)
    with pytest.raises(ValueError, match="at least 7"):
        manifold(x[:3], x)
    with pytest.raises(ValueError, match="have 64 and 32 features; they must come from one extractor"):
        kid(x, x[:, :32])
    with pytest.raises(ValueError, match="there is no metric 'fidd'; the nearest is fid; there are fid, patch"):
        find_metric("fidd")


def test_singular_covariances_are_exact():
    """A constant, a repeated and a rescaled feature: the distance and its interval are those without the first two."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 8, generator=g), 1.3 * torch.randn(300, 8, generator=g) + 0.2
    wide = lambda x: torch.cat([x, torch.full((300, 1), 5.0), x[:, :1]], 1)
    plain, more = fid(a, b), fid(wide(a), wide(b))
    scaled = lambda x: x * torch.tensor([math.sqrt(2)] + [1.0] * 7)  # a feature that is there twice counts twice
    assert more.value == pytest.approx(fid(scaled(a), scaled(b)).value, rel=1e-6)
    assert more.high == pytest.approx(fid(scaled(a), scaled(b)).high, rel=1e-4)
    assert plain.value == pytest.approx(frechet(a, b), rel=1e-12)


# Agreement with the peers: the same images, through the same network


def gray(images):
    return folders.quantize(images).expand(-1, 3, 8, 8).contiguous()


class Peer(torch.nn.Module):
    """One of our extractors as the peers want it: uint8 [B, 3, H, W] -> features or logits."""

    def __init__(self, spec, key="features", dtype=torch.float64):
        super().__init__()
        self.spec, self.key, self.dtype, self.num_features = spec, key, dtype, 64 if key == "features" else 10

    def forward(self, x):
        x = x[:, :1] if self.spec == "digits" else x
        return load(self.spec).net(x.float())[self.key].to(self.dtype)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """597 held-out digits as the reference, 597 training digits with a little noise as the images: files, tensors."""
    real, (images, labels) = digits("heldout")[0], digits("train")
    noise = torch.randn(597, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    fake, where = images[:597] + 0.2 * noise, tmp_path_factory.mktemp("images")
    folders.write_folder(where / "real", real)
    folders.write_folder(where / "fake", fake, labels[:597])
    return where, gray(fake), gray(real)


def ours(pairs, spec):
    return [features(pairs[0] / name, load(spec), batch=597) for name in ("fake", "real")]


@pytest.mark.parametrize("spec", ["random", "digits"])
def test_torch_fidelity_agrees(pairs, spec, monkeypatch):
    """Its own calculate_metrics over the same images: FID, KID, Inception Score, precision and recall."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Ours(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.net = {key: Peer(spec, key) for key in features_list}

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, x):
            return tuple(self.net[key](x) for key in self.features_list)

    class Images(torch.utils.data.Dataset):
        def __init__(self, x):
            self.x = x

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            return self.x[i]

    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "ours", Ours)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(pairs[1]), input2=Images(pairs[2]), feature_extractor="ours", cuda=False, cache=False, fid=True,
        kid=True, isc=True, prc=True, kid_subset_size=100, batch_size=597, verbose=False, dataloader_workers=0,
    )  # fmt: skip
    fake, real = ours(pairs, spec)
    close = lambda a, b: a == pytest.approx(b, rel=1e-6)
    assert close(fid(fake, real).value, theirs["frechet_inception_distance"])
    assert close(kid(fake, real, size=100).value, theirs["kernel_inception_distance_mean"])
    assert close(inception_score(fake).value, theirs["inception_score_mean"])
    found = manifold(fake, real)
    assert close(found["precision"].value, theirs["precision"]) and close(found["recall"].value, theirs["recall"])
    assert 0.1 < found["precision"].value < 0.999  # it says something


@pytest.mark.parametrize("spec", ["random", "digits"])
def test_torchmetrics_agrees(pairs, spec):
    """KID in one subset of all images, the Inception Score in one split: where they draw nothing."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    theirs = FrechetInceptionDistance(feature=Peer(spec)).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Peer(spec), subsets=1, subset_size=597)
    for peer in (theirs, kernel):
        peer.update(pairs[2], real=True)
        peer.update(pairs[1], real=False)
    fake, real = ours(pairs, spec)
    assert fid(fake, real).value == pytest.approx(theirs.compute().item(), rel=1e-6)
    assert kid(fake, real).value == pytest.approx(kernel.compute()[0].item(), rel=1e-6)
    inception = InceptionScore(feature=Peer(spec, "logits"), splits=1)
    inception.update(pairs[1])
    assert inception_score(fake, splits=1).value == pytest.approx(inception.compute()[0].item(), rel=1e-6)


@pytest.mark.parametrize("spec", ["random", "digits"])
def test_clean_fid_agrees(pairs, spec):
    """From its own reading of the folders, without its resizing (tests/eval/test_features.py has that): FID and KID."""
    from cleanfid.fid import frechet_distance, get_folder_features, kernel_distance

    def read(name):
        net, cpu = Peer(spec), torch.device("cpu")
        how = {"num_workers": 0, "batch_size": 597, "device": cpu, "mode": "legacy_tensorflow", "verbose": False}
        return get_folder_features(str(pairs[0] / name), net, **how)

    a, b = read("fake"), read("real")
    fake, real = ours(pairs, spec)
    assert kid(fake, real).value == pytest.approx(kernel_distance(b, a, num_subsets=1), rel=1e-6)
    moments = [m for x in (a, b) for m in (x.mean(0), np.cov(x, rowvar=False))]
    try:
        theirs = frechet_distance(*moments)
    except TypeError:  # SciPy 1.18 took away sqrtm(disp=), with which clean-fid calls it: its formula by hand
        mu_a, cov_a, mu_b, cov_b = moments
        theirs = ((mu_a - mu_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert fid(fake, real).value == pytest.approx(theirs, rel=1e-6)


def test_density_and_coverage_by_hand():
    """On a line, k = 1: real balls are [-1, 1], [0, 2], [4, 6], [5, 7], open; fakes 0.5, 1.5, 20 and 21."""
    real = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
    fake = torch.tensor([[0.5], [1.5], [20.0], [21.0]])
    found = manifold(fake, real, k=1, k_density=1)
    assert found["density"].value == 3 / 4 and found["coverage"].value == 2 / 4
    assert found["precision"].value == 2 / 4 and found["off_support"].value == 2 / 4


def test_precision_and_recall_by_hand():
    """On a line, k = 1: real balls are [-1, 2], [4, 6]; fakes 1.5, 3 and 5.5 with radii 1.5, 1.5, 2.5."""
    real, fake = torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([[1.5], [3.0], [5.5], [20.0]])
    found = manifold(fake, real, k=1, k_density=1)
    assert (found["precision"].value, found["recall"].value, found["recall"].n) == (0.5, 1.0, 4)


def test_cmmd_by_hand():
    """Two orthogonal directions: |x - y|^2 is 0 or 2, k = 1 or e = exp(-1 / 100)."""
    e = math.exp(-0.01)
    x = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    y = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert cmmd(x, y).value == pytest.approx(1000 * ((1 + e) / 2 + 1 - (1 + e)), rel=1e-9)
    assert cmmd(x, x).value == pytest.approx(0, abs=1e-9)


def test_vendi_of_orthogonal_images_is_their_number():
    eye = torch.eye(6, dtype=torch.float64)
    assert vendi(eye).value == pytest.approx(6) and vendi(eye.repeat(5, 1) * 7).value == pytest.approx(6)
    x = torch.randn(40, 6, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(x @ x.T / 40).clamp(min=1e-300)  # the n x n kernel of the paper
    assert vendi(x).value == pytest.approx((-(values * values.log()).sum()).exp().item(), rel=1e-9)


# Behaviour on constructed data


@pytest.fixture(scope="module")
def halves():
    """The training digits in two halves, as images and labels."""
    images, labels = digits("train")
    return images[:600], labels[:600], images[600:], labels[600:]


def seen(images):
    return classifier()(folders.restore(folders.quantize(images)))[0]


def test_dropped_modes_cost_recall_and_coverage_not_precision(halves):
    real, labels, other, other_labels = halves
    whole = manifold(seen(other), seen(real))
    kept = other[other_labels < 5]
    kept = kept.repeat(2, 1, 1, 1)[:600] + 0.01 * torch.randn(600, 1, 8, 8)[: len(kept) * 2]
    dropped = manifold(seen(kept), seen(real))
    assert whole["precision"].value > 0.8 and whole["recall"].value > 0.8 and whole["coverage"].value > 0.85
    assert dropped["recall"].value < 0.6 and dropped["coverage"].value < 0.55
    assert dropped["precision"].value > whole["precision"].value - 0.05
    assert not intervals_overlap(whole["recall"], dropped["recall"]) and not intervals_overlap(
        whole["coverage"], dropped["coverage"]
    )
    assert dropped["off_support"].value < 0.05


def test_blur_costs_precision_and_density(halves):
    real, _, other, _ = halves
    whole, blurred = manifold(seen(other), seen(real)), manifold(seen(blur(other)), seen(real))
    assert blurred["precision"].value < whole["precision"].value - 0.3 and not intervals_overlap(
        whole["precision"], blurred["precision"]
    )
    assert blurred["density"].value < 0.6 * whole["density"].value
    assert blurred["off_support"].value > whole["off_support"].value + 0.1
    assert fid(seen(blur(other)), seen(real)).value > 5 * fid(seen(other), seen(real)).value
    assert kid(seen(blur(other)), seen(real)).value > 5 * abs(kid(seen(other), seen(real)).value)


def blur(images):
    return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(images, [1] * 4, value=-1.0), 3, 1)


def test_duplicates_cost_vendi_and_diversity(halves):
    """600 images, and two of each class, or three at all, over and over."""
    _, _, other, labels = halves
    few = torch.cat([other[labels == k][:2] for k in range(10)]).repeat(30, 1, 1, 1)
    few_labels = torch.arange(10).repeat_interleave(2).repeat(30)
    random = lambda x: load("random").net(gray(x).float())["features"].double()
    three = other[:3].repeat(200, 1, 1, 1)
    for look in (seen, random):
        assert vendi(look(three)).value < 0.75 * vendi(look(other)).value
        assert not intervals_overlap(vendi(look(few)), vendi(look(other)))
        wide, narrow = diversity(look(other), labels), diversity(look(few), few_labels)
        assert narrow.value < 0.75 * wide.value and not intervals_overlap(wide, narrow)
    from pipelines.judges.perceptual import random_distance as distance

    sets = (other[:100], labels[:100]), (few[:100], few_labels[:100])
    lpips = [pair_diversity(lambda i, x=x: gray(x[i : i + 1]) / 127.5 - 1, y, distance()).value for x, y in sets]
    assert lpips[1] < 0.75 * lpips[0]
    same = diversity(torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert same.value == pytest.approx(0, abs=1e-12) and same.n == 6
    by_hand = diversity(torch.eye(4), torch.tensor([0, 0, 1, 1]))
    assert by_hand.value == pytest.approx(1)  # orthogonal images of each prompt
    with pytest.raises(ValueError, match="two images of some prompts"):
        diversity(torch.eye(3), torch.arange(3))


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP that learned the training digits and their names, stored as a transformers folder."""
    from transformers import CLIPConfig, CLIPModel

    from pipelines.families.tiny import clip_tokenizer

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = clip_tokenizer()
    ids = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = CLIPConfig(
        text_config=small | ids | {"max_position_embeddings": 16, "projection_dim": 16},
        vision_config=small | {"image_size": 8, "patch_size": 2, "projection_dim": 16},
        projection_dim=16,
    )
    net = CLIPModel(config).train()
    images, labels = digits("train")
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    x = (gray(images) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    tokens = words(list(WORDS), padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(250):
        pick = torch.stack([torch.nonzero(labels == k)[torch.randint(int((labels == k).sum()), ())] for k in range(10)])
        out = net(**tokens, pixel_values=x[pick[:, 0]])
        target = torch.arange(10)
        loss = torch.nn.functional.cross_entropy(out.logits_per_image, target)
        loss = loss + torch.nn.functional.cross_entropy(out.logits_per_text, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    where = tmp_path_factory.mktemp("clip")
    net.eval().save_pretrained(where)
    words.save_pretrained(where)
    return where


def with_prompts(folder, images, prompts):
    folders.write_folder(folder, images)
    lines = [json.dumps({"file_name": f"{i:06d}.png", "text": text}) for i, text in enumerate(prompts)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_wrong_prompts_cost_clip_score(clip, tmp_path):
    """Held-out digits with their names, with the next digit's, with names of half of them; through files and rows."""
    images, labels = digits("heldout")
    right, wrong = ([WORDS[(y + by) % 10] for y in labels.tolist()] for by in (0, 1))
    mixed = [a if i % 2 else b for i, (a, b) in enumerate(zip(right, wrong))]
    found = {}
    for name, prompts in (("right", right), ("wrong", wrong), ("mixed", mixed)):
        folder = with_prompts(tmp_path / name, images, prompts)
        row = score_folder(folder, metrics=("clip_score", "pickscore"), extractor=f"clip:{clip}")
        found[name] = {key: Score(**value) for key, value in row["metrics"].items()}
    means = {name: score["clip_score"] for name, score in found.items()}
    assert means["right"].value > means["wrong"].value + 0.4 and not intervals_overlap(means["right"], means["wrong"])
    assert means["mixed"].value == pytest.approx((means["right"].value + means["wrong"].value) / 2, abs=0.1)
    net = load(f"clip:{clip}")
    assert found["right"]["pickscore"].value == pytest.approx(net.scale * means["right"].value, rel=1e-6)
    from transformers import AutoTokenizer, CLIPModel

    theirs, words = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
    x = (gray(images[:5]) / 255 - torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )[:, None, None]
    tokens = words(right[:5], padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = theirs(**tokens, pixel_values=x)
    expected = (out.image_embeds * out.text_embeds).sum(1).mean().item()  # transformers normalises both
    folder = with_prompts(tmp_path / "five", images[:5], right[:5])
    five = score_folder(folder, metrics=("clip_score",), extractor=f"clip:{clip}")
    assert five["metrics"]["clip_score"]["value"] == pytest.approx(expected, rel=1e-5)


# Hallucinations


MODES, STD = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 0.05


class Exact(torch.nn.Module):
    """E[x0 | x] of equal Gaussians on a line, at the paper's means 1, 2, 3 and standard deviation .05."""

    def forward(self, x, sigma):
        v = STD**2 + sigma.double()[:, None] ** 2
        w = torch.softmax(-(x - MODES).square() / (2 * v), 1)
        return (w * (MODES + STD**2 / v * (x - MODES))).sum(1, keepdim=True)


def test_hallucinations_between_modes_are_seen_in_the_right_window():
    """A fifth of the samples lie anywhere from 1 to 3: found at levels near the modes' width, not at wide ones."""
    from distill.diffusion.denoiser import Denoiser
    from distill.diffusion.schedule import EDM, Flow

    teacher = Denoiser(Exact(), EDM(), "x0", lambda net, x, t, c: net(x, t))
    g = torch.Generator().manual_seed(0)
    draw = lambda: MODES[torch.randint(3, (2000,), generator=g)][:, None] + STD * torch.randn(2000, 1, generator=g)
    real, other, fake = draw().double(), draw().double(), draw().double()
    fake[:400] = 1 + 2 * torch.rand(400, 1, generator=g)
    truth = (fake - MODES).abs().min(1).values > 4 * STD
    hal = lambda x, levels, by=teacher: hallucination.variance(hallucination.predict_x0_at_levels(by, x, None, levels))
    near, wide = (0.02, 0.03, 0.04, 0.05), (0.8, 1.0, 1.2, 1.5)
    assert hallucination.auc(hal(fake, near), truth) > 0.93 and hallucination.auc(hal(fake, wide), truth) < 0.65
    found = hallucination.rate(hal(fake, near), hal(real, near))
    clean = hallucination.rate(hal(other, near), hal(real, near))
    assert (
        0.5 * truth.double().mean() < found.value < 0.25 and clean.value < 0.02 and not intervals_overlap(found, clean)
    )
    flow = hal(fake, near, teacher.on_schedule(Flow()))  # the same levels on another schedule
    assert flow.allclose(hal(fake, near), rtol=1e-3, atol=1e-9)
    batches = hallucination.predict_x0_at_levels(teacher, fake, None, near, batch=7)
    assert batches.allclose(hallucination.predict_x0_at_levels(teacher, fake, None, near), rtol=1e-12)
    with pytest.raises(ValueError, match="at least 2 ratios"):
        hallucination.predict_x0_at_levels(teacher, fake, None, [0.1])
    with pytest.raises(ValueError, match=r"\[T, N, ...\] with T >= 2"):
        hallucination.variance(fake[None])
    with pytest.raises(ValueError, match="sample 1 are NaN"):
        hallucination.variance(torch.tensor([[[1.0], [2.0]], [[1.0], [math.nan]]]))


def test_auc_by_hand():
    scores, truth = torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([True, True, False, False])
    assert hallucination.auc(scores, truth) == (1 + 1 + 1 + 0.5) / 4
    with pytest.raises(ValueError, match="0 of 4"):
        hallucination.auc(scores, truth & False)


# Intervals


def close_to_bootstrap(statistic, x, repeats=150):
    """The width of an interval over that of the bootstrap of its value."""
    g = torch.Generator().manual_seed(1)
    drawn = torch.tensor([statistic(x[torch.randint(len(x), (len(x),), generator=g)]).value for _ in range(repeats)])
    found = statistic(x)
    return (found.high - found.low) / 2 / Z / drawn.std().item()


def test_influence_is_the_bootstrap():
    """FID, KID, CMMD, Vendi of 500 x 8 samples: the width is that of 150 resamplings, within 25 %."""
    g = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 2, 8)
    x, y = torch.randn(500, 8, generator=g) * scale + 0.5, torch.randn(500, 8, generator=g)
    whole = lambda a: kid(a, y, subsets=1)
    for statistic in (lambda a: fid(a, y), whole, lambda a: cmmd(a, y), vendi):
        assert 0.75 < close_to_bootstrap(statistic, x) < 1.25


def test_the_interval_of_fid_covers():
    """200 sets of 400 from one Gaussian: the intervals hold the mean of their figures in 90 to 99 %."""
    g = torch.Generator().manual_seed(0)
    y = 1.4 * torch.randn(2000, 6, generator=g) + 0.3
    found = [fid(torch.randn(400, 6, generator=g), y) for _ in range(200)]
    mean = sum(f.value for f in found) / 200
    assert 0.90 <= sum(f.low <= mean <= f.high for f in found) / 200 <= 0.99


def test_fixed_labels_narrow_the_interval():
    """Two far modes of 200 images each: with labels the interval is that of the spread within them."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    make = lambda: torch.randn(400, 4, generator=g) + 6 * labels[:, None]
    real = torch.randn(1000, 4, generator=g) + 6.5 * (torch.arange(1000) % 2)[:, None]
    sets = [make() for _ in range(60)]
    spread = torch.tensor([fid(x, real).value for x in sets]).std().item()
    strata, plain = fid(sets[0], real, labels), fid(sets[0], real)
    assert (strata.high - strata.value) / Z == pytest.approx(spread, rel=0.3)
    assert plain.high - plain.value > 1.5 * (strata.high - strata.value)
    assert strata.value == plain.value


def test_fid_is_biased_like_one_over_n():
    """Samples of the reference's own distribution: n = 400 gives about twice the distance of n = 800."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn(50_000, 16, generator=g)
    small, large = (sum(frechet(torch.randn(n, 16, generator=g), y) for _ in range(10)) for n in (400, 800))
    assert 1.6 < small / large < 2.5


def test_shares_and_ties():
    """Wilson's interval of 8 of 10 (0.4902, 0.9433), and of all of them, which has a width."""
    found = proportion(torch.tensor([True] * 8 + [False] * 2))
    assert found == pytest.approx((0.8, 0.4901625, 0.9433178, 10), abs=1e-6)
    whole = proportion(torch.ones(100, dtype=torch.bool))
    assert whole.value == whole.high == 1 and 0.95 < whole.low < 0.97
    a, b = Score(1.0, 0.9, 1.1, 10), Score(1.15, 1.05, 1.25, 10)
    assert (
        intervals_overlap(a, b)
        and intervals_overlap(b._asdict(), a._asdict())
        and not intervals_overlap(a, b._replace(low=1.11))
    )


def test_halving_is_the_spread_of_the_mean():
    """The mean of 400 normal numbers: 1 / 400^1/2, and by strata the spread within them."""
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = HalvingIntervals(400)(lambda i: x[i].mean().item())
    assert (found.high - found.value) / Z == pytest.approx(0.05, rel=0.5)
    labels = torch.arange(400) % 2
    narrow = HalvingIntervals(400, labels)(lambda i: (100 * labels[i] + x[i]).mean().item())
    assert (narrow.high - narrow.value) / Z == pytest.approx(0.05, rel=0.5)


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


# Rows


def test_real_digits_score_at_the_floor(tmp_path):
    """The held-out digits as a "model": distance 0 to themselves; the row is that of the contract."""
    images, labels = digits("heldout")
    folders.write_folder(tmp_path / "real", images, labels, name="real", seed=3, steps=2, nfe=1)
    row = score_folder(tmp_path / "real")
    found = {name: Score(**value) for name, value in row["metrics"].items()}
    assert list(found) == ["fd_heldout", "fd_train", "accuracy", "precision", "recall"]
    assert found["fd_heldout"].value == pytest.approx(0, abs=1e-6)
    assert found["fd_train"].value > 1 and found["accuracy"].value == pytest.approx(classifier().accuracy)
    assert found["precision"].value > 0.8 and found["recall"].value > 0.8 and found["recall"].n == 597
    assert all(s.low <= s.value <= s.high for s in found.values())
    assert (row["model"], row["n"], row["seeds"], row["steps"], row["cost"]["nfe"]) == ("real", 597, [3], 2, 1)
    assert row["protocol"] == "digits" and row["protocol_hash"] != PROTOCOLS["digits"].hash  # n is not the protocol's
    assert (row["extractor"], row["extractor_hash"]) == ("digits", classifier().hash)
    assert json.loads(json.dumps(row)) == row
    folders.write_folder(tmp_path / "noise", torch.randn(300, 1, 8, 8), torch.arange(300) % 10)
    noise = {name: Score(**value) for name, value in score_folder(tmp_path / "noise")["metrics"].items()}
    assert noise["fd_heldout"].value > 5 * found["fd_train"].value
    assert noise["precision"].value < 0.2 and noise["accuracy"].value < 0.3


def test_any_metric_under_any_extractor(tmp_path):
    """Every metric that needs no text, by the random extractor, against a folder of real images; hashed as well."""
    images, labels = digits("heldout")
    folders.write_folder(tmp_path / "a", images[:120], labels[:120])
    folders.write_folder(tmp_path / "b", images[200:400])
    digits_only = ("fd_heldout", "fd_train")
    names = tuple(
        name for name, m in METRICS.items() if not {"texts", "teacher"} & {*m.needs} and name not in digits_only
    )
    row = score_folder(tmp_path / "a", metrics=names, extractor="random", reference_folder=tmp_path / "b")
    split = {"precision_recall": ("precision", "recall"), "density_coverage": ("density", "coverage")}
    split["colour"] = ("chroma", "contrast")
    assert set(row["metrics"]) == set(itertools.chain(*(split.get(name, (name,)) for name in names)))
    assert all(math.isfinite(v) for m in row["metrics"].values() for k, v in m.items() if k != "better")
    assert row["protocol"] == "custom" and validate_rows([row]) == [row]  # the tables take it as it is
    other = score_folder(tmp_path / "a", metrics=("kid",), extractor="random", reference_folder=tmp_path / "a")
    assert other["protocol_hash"] != row["protocol_hash"]


def test_stored_moments_are_a_reference(tmp_path):
    """mu and sigma of EDM's kind of file: the distance is that of the folder; what needs images says so."""
    images, labels = digits("heldout")
    folders.write_folder(tmp_path / "a", digits("train")[0][:300])
    folders.write_folder(tmp_path / "b", images)
    statistics = moments(features(tmp_path / "b", load("digits")))
    np.savez(tmp_path / "b.npz", mu=statistics.mean.numpy(), sigma=statistics.cov.numpy())
    how = {"metrics": ("fid",), "extractor": "digits"}
    one, other = (score_folder(tmp_path / "a", reference_folder=tmp_path / name, **how) for name in ("b", "b.npz"))
    assert one["metrics"]["fid"]["value"] == pytest.approx(other["metrics"]["fid"]["value"], rel=1e-9)
    assert one["protocol_hash"] != other["protocol_hash"]
    with pytest.raises(ValueError, match="needs a folder of reference images, not their mean"):
        score_folder(tmp_path / "a", metrics=("kid",), extractor="digits", reference_folder=tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", x=statistics.mean.numpy())
    with pytest.raises(ValueError, match="c.npz does not hold the arrays mu and sigma"):
        score_folder(tmp_path / "a", reference_folder=tmp_path / "c.npz", **how)


def test_photos_are_cut_to_their_middle_square(tmp_path):
    """Without a protocol: photos of 24 x 16 score as their squares do. A protocol keeps its definition."""
    draw = np.random.default_rng(0)
    for i in range(12):
        pixels = draw.integers(0, 256, (16, 24, 3), dtype=np.uint8)
        for name, array in (("wide", pixels), ("square", pixels[:, 4:20])):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"{i}.png")
    how = {"metrics": ("kid",), "extractor": "random"}
    found = [score_folder(tmp_path / name, reference_folder=tmp_path / other, **how)["metrics"]
             for name, other in (("wide", "square"), ("square", "wide"), ("square", "square"))]  # fmt: skip
    assert found[0] == found[1] == found[2]
    assert PROTOCOLS["mjhq30k"].hash == "8be8741a909c3a4e"


def test_wrong_requests_are_one_clear_error(tmp_path, capsys):
    images, labels = digits("heldout")
    folders.write_folder(tmp_path / "a", images[:100])

    def fails(match, folder="a", **how):
        with pytest.raises(ValueError, match=match) as told:
            score_folder(tmp_path / folder, **how)
        assert len(str(told.value)) < 600

    fails("a has no labels, which accuracy needs", metrics=("accuracy",))
    fails("has no prompts .metadata.jsonl., which clip_score needs", metrics=("clip_score",), extractor="random")
    fails("has no two images of each of two prompts", metrics=("dino_diversity",), extractor="random")
    fails("there is no metric 'fud'; the nearest is fid; there are fid", metrics=("fud",))
    fails("there is no protocol 'coco'", protocol="coco")
    fails("extractor 'vgg' is unknown", metrics=("vendi",), extractor="vgg")
    fails("name their folder by --reference", metrics=("fid",))
    fails("lacks data; put", protocol="mjhq30k")
    fails("write EXTRACTOR=EXTRACTOR", metrics=("vendi",), use=("random",))
    folders.write_folder(tmp_path / "small", images[:20], labels[:20])
    fails(
        "n = 20 samples of 64 features; at least 65 .* measure kid", "small", metrics=("fd_train",), protocol="digits"
    )
    with_prompts(tmp_path / "long", images[:2], ["a", "b" * 20_001])
    fails("line 2: a text of 20,001 characters", "long", metrics=("clip_score",))
    with_prompts(tmp_path / "more", images[:2], ["a", "b", "c"])
    assert Folder(tmp_path / "more").texts == ["a", "b"]
    assert "names 1 images that are not there: 000002.png" in capsys.readouterr().err
    with_prompts(tmp_path / "short", images[:5], ["one"] * 4)
    fails('does not hold a line {"file_name", "text"} for every image', "short", metrics=("clip_score",))
    (tmp_path / "file").touch()
    for out, match in (
        (tmp_path / "a", "--out is .*a, which is a folder; name a file"),
        (tmp_path / "file" / "x", "is a file"),
    ):
        with pytest.raises(ValueError, match=match):
            score_folders((tmp_path / "a",), out, metrics=("vendi",), extractor="random")


def statistics(**changed):
    e = np.eye(64)
    return {"mu": np.zeros(64), "sigma": e, **changed}


def edited(*entries):
    sigma = np.eye(64)
    for i, j, value in entries:
        sigma[i, j] = value
    return sigma


@pytest.mark.parametrize(
    "stored, match",
    [
        (statistics(mu=np.full(64, math.nan)), "mu holds NaN"),
        (statistics(sigma=edited((3, 4, math.nan))), "sigma holds NaN"),
        (statistics(sigma=np.full((64, 64), math.inf)), "sigma holds NaN or infinite"),
        (statistics(sigma=edited((3, 4, 0.1))), "asymmetric by 0.1"),
        (statistics(sigma=edited((3, 3, -0.5))), "negative eigenvalue -0.5"),
        (statistics(sigma=np.zeros((64, 64))), "no positive eigenvalue; make it from more"),
        (statistics(sigma=np.ones((64, 3))), r"sigma \[64, 3\]"),
        (statistics(sigma=np.ones(64)), r"sigma \[64\]"),
        (statistics(mu=np.zeros((1, 64))), r"mu has shape \[1, 64\]"),
        (statistics(mu=np.zeros(3), sigma=np.eye(3)), "is of 3 features, random has 64"),
        (statistics(mu=np.zeros(64, complex)), "mu is of kind complex128, no real numbers"),
        (statistics(mu=np.array(["a"] * 64)), "no real numbers"),
        (statistics(mu=np.array([None] * 64)), "Object arrays cannot be loaded"),
        (statistics(mu=np.full(64, 1e200)), "the distance is inf"),
        ({"x": np.zeros(1)}, "does not hold the arrays mu and sigma"),
        (b"PK\x03\x04 torn", "does not hold the arrays mu and sigma"),
        (b"", "does not hold the arrays mu and sigma"),
    ],
)
def test_a_reference_that_is_no_statistics_is_refused(stored, match, tmp_path):
    """A NaN gave FID 0.00."""
    path, folder = tmp_path / "reference.npz", tmp_path / "a"
    folders.write_folder(folder, torch.rand(80, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    path.write_bytes(stored) if isinstance(stored, bytes) else np.savez(path, **stored)
    with pytest.raises(ValueError, match=match):
        score_folder(folder, metrics=("fid",), extractor="random", reference_folder=path)


def test_labels_that_a_teacher_does_not_know(tmp_path):
    tiny.save("edm", tmp_path / "edm")
    folders.write_folder(tmp_path / "a", torch.zeros(2, 1, 8, 8), labels=[0, 11])
    with pytest.raises(ValueError, match=r"a has labels up to 11, and .*edm knows 0 \.\. 10"):
        hallucination.hallucination(tmp_path / "a", tmp_path / "a", tmp_path / "edm", (0.1, 0.2))


def test_a_bomb_of_statistics(tmp_path, monkeypatch):
    """A zip of arrays that would fill the memory is refused by the sizes that it says."""
    monkeypatch.setattr("eval.figures.LARGEST", 1 << 20)
    with zipfile.ZipFile(tmp_path / "r.npz", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("sigma.npy", bytes(1 << 22))
    with pytest.raises(ValueError, match="r.npz .*sigma.npy unpacks to 4,194,304 bytes"):
        statistics_of(tmp_path / "r.npz", 9)


def test_statistics_in_float32_are_accepted(tmp_path):
    """Published files are: of a nearly singular covariance rounding makes eigenvalues below 0."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=draw).double() @ torch.randn(8, 64, generator=draw).double()
    found = moments(x)
    np.savez(tmp_path / "m.npz", mu=found.mean.float().numpy(), sigma=found.cov.float().numpy())
    stored = statistics_of(tmp_path / "m.npz", 200)
    assert stored.cov.equal(stored.cov.T) and torch.linalg.eigvalsh(stored.cov)[0] < 0
    y = torch.randn(300, 64, generator=draw)
    assert fid(y, stored).value == pytest.approx(fid(y, found).value, rel=1e-3)


def test_figures_that_overflow_are_refused():
    """Finite features whose squares are not: no clamp and no comparison turns them into a figure."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(80, 4, generator=draw).double() for _ in range(2))
    with pytest.raises(ValueError, match="overflow float32"):
        manifold(x * 1e25, y)
    for found in (lambda: kid(x * 1e120, y), lambda: fid(x * 1e160, y), lambda: frechet(y, x * 1e160)):
        with pytest.raises(ValueError, match="too large|not finite"):
            found()
    for fake, real in ((math.nan, 0.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="NaN"):
            hallucination.rate(torch.tensor([0.0, fake]), torch.tensor([1.0, real]))
    with pytest.raises(ValueError, match="no rank"):
        hallucination.auc(torch.tensor([0.0, math.nan]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="sample 1 are NaN"):
        accuracy(torch.tensor([[0.0, 1.0], [math.nan, 1.0]]), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"labels are 0 \.\. 2, of 2 classes"):
        accuracy(torch.zeros(2, 2), torch.tensor([2, 0]))


def test_a_metric_or_a_folder_that_fails_takes_no_other_with_it(tmp_path, monkeypatch, capsys):
    """Too few images for fid: no network runs for it, kid is kept and named. Broken folders leave the other rows."""
    images = torch.rand(90, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    folders.write_folder(tmp_path / "real", images)
    for name in ("few", "torn", "bomb", "memory"):
        folders.write_folder(tmp_path / name, images[:20])
    row = score_folder(tmp_path / "few", metrics=("fid", "kid"), extractor="random", reference_folder=tmp_path / "real")
    assert (
        list(row["metrics"]) == ["kid"]
        and "at least 65 are needed: use more images, or measure kid" in row["left_out"]["fid"]
    )
    ran = []
    real = feature_module._outputs

    def outputs(batches, *others):
        ran.append(1)
        batches = list(batches)
        if batches[0][0][0].parent.name == "memory":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
        return real(iter(batches), *others)

    monkeypatch.setattr(feature_module, "_outputs", outputs)
    with pytest.raises(ValueError, match="fid: generated set has n = 20"):
        score_folder(tmp_path / "few", metrics=("fid",), extractor="random:5", reference_folder=tmp_path / "real")
    assert not ran, "refused before a network ran"
    (tmp_path / "torn" / "000003.png").write_bytes((tmp_path / "torn" / "000003.png").read_bytes()[:40])
    (tmp_path / "bomb" / "000003.png").write_bytes(png(60_000, 60_000))
    names = ("absent", "torn", "bomb", "memory", "few")
    how = {"metrics": ("fid", "kid"), "extractor": "random:5", "reference": tmp_path / "real"}
    with pytest.raises(PartialFailure) as ended:
        score_folders(tuple(tmp_path / name for name in names), tmp_path / "rows.json", **how)
    told = str(ended.value)
    assert "(1 of 5 folders were scored)" in told and [row["samples"] for row in ended.value.results] == [
        f"{tmp_path / 'few'}"
    ]
    for match in ("no folder .*absent", "torn/000003.png cannot be read", "bomb/000003.png cannot be read.*bomb"):
        assert re.search(match, told)
    assert "there is not enough memory" in told and "few was scored without fid: generated set" in told
    (row,) = json.loads((tmp_path / "rows.json").read_text())

    def killed(*_):
        raise KeyboardInterrupt

    folders.write_folder(tmp_path / "new", images[30:50])
    monkeypatch.setattr(feature_module, "_outputs", killed)  # few's features are kept
    with pytest.raises(KeyboardInterrupt):
        score_folders((tmp_path / "few", tmp_path / "new"), tmp_path / "some.json", **how)
    assert [one["samples"] for one in json.loads((tmp_path / "some.json").read_text())] == [row["samples"]]
    assert row["metrics"]["kid"]["n"] == 20 and math.isfinite(row["metrics"]["kid"]["value"])


def test_every_metric_says_where_it_is_from():
    for name, entry in METRICS.items():
        assert len(entry.source) > 10 and entry.interval in entry.description, name
        assert ("never run here" in entry.description) == (entry.extractor not in ("digits", "pixels")), name
    measured = {m.metric for p in PROTOCOLS.values() for m in p.measures}
    assert measured <= METRICS.keys()


def test_verify_compares_and_says_what_it_left_out(pairs, monkeypatch, tmp_path):
    """Arithmetic holds on the random extractor; absent weights are named; a figure that is off fails the command."""
    from eval import verify as module

    a, b = pairs[0] / "fake", pairs[0] / "real"
    found, missing = module.verify(
        a, b, ("arithmetic", "clean-fid", "clip"), "random", "random", "clip:x", tmp_path / "verify.json"
    )
    assert [c.name for c in found["arithmetic"]] == ["fid", "kid", "precision", "recall", "inception_score"]
    assert all(c.agrees for c in found["arithmetic"]) and found.keys() == {"arithmetic"}
    assert "inception-2015-12-05.pt" in missing["clean-fid"] and "not of open_clip" in missing["clip"]
    assert json.loads((tmp_path / "verify.json").read_text())["checks"]["arithmetic"][0]["holds"]
    monkeypatch.setattr(module, "kid", lambda *_, **__: Score(1.0, 1.0, 1.0, 1))
    monkeypatch.setattr(sys, "argv", ["verify", "--folder", f"{a}", "--reference", f"{b}", "--peers", "arithmetic",
                                      "--extractor", "random", "--logits", "random"])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 1


def test_help_is_light():
    """--help of every stage of this room's half, in one process, without the libraries that take seconds."""
    code = """
import contextlib, io, runpy, sys
for stage in ("score", "features", "verify", "hallucination"):
    sys.argv, told = [stage, "--help"], io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        runpy.run_module(f"eval.{stage}", run_name="__main__")
    assert "--folder" in told.getvalue(), stage
heavy = "diffusers", "transformers", "matplotlib", "sklearn", "scipy", "accelerate", "open_clip", "torch_fidelity"
assert not [m for m in heavy if m in sys.modules], [m for m in heavy if m in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-1000:]
