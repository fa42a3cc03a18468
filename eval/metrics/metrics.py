"""Feature sets -> numbers with confidence intervals. `METRICS` lists them with their sources.

A set is a tensor [N, D] or `eval.features.Features`, which is read in chunks: moments and kernels need no more memory
for more images. Arithmetic is float64. The interval says how far the figure would move had other images been generated
by the same model; the reference is held fixed, and so is the bias of a finite n: compare figures of one n only.

How an interval (95 %) comes about:
influence  the infinitesimal jackknife, the bootstrap to first order (Efron 1982): value +- 1.96 sd(psi) / n^1/2, with
           psi_i the derivative of the figure by the weight of image i
halving    the set is split in halves at random, ten times; the variance is a quarter of the mean squared difference
strata     both of these resample within labels [N] where given: the labels of generated images are not drawn but fixed,
           i % 10, which for digits more than halves the spread
mean       Student's t over images or prompts; shares of images: Wilson's interval
splits     Student's t over ten disjoint parts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from eval.features.extraction import Features

    Set = Tensor | Features

Z = 1.959963984540054  # the normal quantile of a 95 % interval


class Score(NamedTuple):
    """A figure, its 95 % interval, and how many images it was made from."""

    value: float
    low: float
    high: float
    n: int


def score(value: float, low: float, high: float, n: int) -> Score:
    """A figure with its interval. ValueError where one of them is NaN or infinite: it overflowed."""
    if not all(map(math.isfinite, (value, low, high))):
        raise ValueError(f"the figure is {value} ({low} to {high}), not finite: features or reference are too large")
    return Score(value, low, high, n)


def tie(a: Score | Mapping[str, float], b: Score | Mapping[str, float]) -> bool:
    """Whether two intervals (scores, or their entries in a row) overlap: then neither is said to be better."""
    (low, high), (other_low, other_high) = (
        (x["low"], x["high"]) if isinstance(x, Mapping) else (x.low, x.high) for x in (a, b)
    )
    return low <= other_high and other_low <= high


# Sets


def chunks(x: Set, key: str = "features") -> Iterator[Tensor]:
    """A set as tensors [k, D] in float64, k <= 1000."""
    yield from (chunk.double() for chunk in x.split(1000)) if isinstance(x, Tensor) else x.chunks(key)


def count(x: Set) -> int:
    return len(x) if isinstance(x, Tensor) else x.n


def rows(x: Set, index: Tensor | None = None) -> Tensor:
    """Some rows of a set, by default all, in float64."""
    if isinstance(x, Tensor):
        return (x if index is None else x[index]).double()
    return x.rows(index)


def draw(of: int, n: int, seed: int = 0) -> Tensor:
    """n of `of` indices without replacement, drawn from the seed; all in order where there are no more."""
    return torch.arange(of) if of <= n else torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:n]


def check(x: Set, name: str, least: int, key: str = "features") -> int:
    """The number of features D. ValueError for another shape, fewer than `least` images, NaN or infinite features."""
    if isinstance(x, Tensor) and x.ndim != 2:
        raise ValueError(f"{name} features have shape {list(x.shape)}; [N, D] is needed")
    first, seen = None, 0
    for chunk in chunks(x, key):
        first = chunk.shape[1] if first is None else first
        if not torch.isfinite(chunk).all():
            bad = seen + int((~torch.isfinite(chunk).all(1)).nonzero()[0])
            raise ValueError(f"{name} features of sample {bad} are NaN or infinite; find the step that made them")
        seen += len(chunk)
    if seen < least or first is None:
        raise ValueError(too_few(name, seen, first or 0, least))
    return first


def too_few(name: str, n: int, width: int, least: int) -> str:
    """The message for a set with too few images."""
    kid = ", or measure kid, which needs 2 images for any number of features" if least > width > 0 else ""
    return f"{name} set has n = {n} samples of {width} features; at least {least} are needed: use more images{kid}"


def _pair(fake: Set, real: Set, least: int) -> int:
    wide = check(fake, "generated", least), check(real, "reference", least)
    if wide[0] != wide[1]:
        raise ValueError(f"the sets have {wide[0]} and {wide[1]} features; they must come from one extractor")
    return wide[0]


# Frechet distance


ROUNDING = 1e-5  # of a covariance, relative to its largest value: published files hold float32


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] (over n - 1) of n samples."""

    n: int
    mean: Tensor
    cov: Tensor

    def check(self, name: str) -> Moments:
        """The same with an exactly symmetric covariance. ValueError, with `name`, if the values are impossible."""
        mean, cov = self.mean, self.cov
        if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{name}: mu has shape {list(mean.shape)} and sigma {list(cov.shape)}; [D] and [D, D] are needed"
            )
        for key, values in (("mu", mean), ("sigma", cov)):
            if not torch.isfinite(values).all():
                raise ValueError(f"{name}: {key} holds NaN or infinite values; make the statistics again")
        off = (cov - cov.T).abs().max()
        if off > ROUNDING * cov.abs().max():
            raise ValueError(f"{name}: sigma is not a covariance: it is asymmetric by {off:.3g}")
        cov = (cov + cov.T) / 2
        values = _eigenvalues(cov, name)
        if values[-1] <= 0:
            raise ValueError(f"{name}: sigma has no positive eigenvalue; make it from more than one image")
        if values[0] < -ROUNDING * values[-1]:
            raise ValueError(f"{name}: sigma is not a covariance: it has the negative eigenvalue {values[0]:.3g}")
        return Moments(self.n, mean, cov)


def moments(x: Set | Moments, name: str = "first") -> Moments:
    """Running sums over the chunks of a set (Chan et al. 1979). ValueError for NaN and for n <= D."""
    if isinstance(x, Moments):
        return x
    width = x.shape[-1] if isinstance(x, Tensor) else next(x.chunks()).shape[1]
    check(x, name, width + 1)  # with less the covariance is singular
    n, mean, scatter = 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for chunk in chunks(x):
        k, centre = len(chunk), chunk.mean(0)
        step, part = centre - mean, chunk - centre
        scatter += part.T @ part + torch.outer(step, step) * (n * k / (n + k))
        mean = mean + step * (k / (n + k))
        n += k
    return Moments(n, mean, scatter / (n - 1))


def frechet(a: Set | Moments, b: Set | Moments) -> float:
    """Frechet distance of the Gaussians fitted to two sets (Dowson & Landau 1982; Heusel et al. 2017).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), covariances over n - 1, by symmetric eigen-decompositions.
    Biased upwards at finite n. ValueError for NaN and for n <= D; a covariance that is singular for another reason (a
    constant feature) is no problem: negative eigenvalues, which are rounding, count as zero.
    """
    a, b = moments(a, "first"), moments(b, "second")
    _same_width(a, b)
    root = _root(a.cov)
    cross = _eigenvalues(root @ b.cov @ root, "the product of the covariances").clamp(min=0).sqrt().sum()
    return _distance(a, b, cross)


def fid(fake: Set, real: Set | Moments, strata: Tensor | None = None) -> Score:
    """`frechet` with its interval by influence: psi = 2 d.m + d.d - d.T d for d = x - mu, m = mu - mu_real.

    T = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2 is the optimal map between the Gaussians, A^-1/2 the pseudo-inverse.
    """
    a, b = moments(fake, "generated"), moments(real, "reference")
    _same_width(a, b)
    values, vectors = _eigen(a.cov, "the generated covariance")
    keep = values > values[-1].clamp(min=0) * 1e-12
    scaled = vectors[:, keep] * values[keep].sqrt()  # a square root of A
    inner, turn = _eigen(scaled.T @ b.cov @ scaled, "the product of the covariances")
    inner = inner.clamp(min=0).sqrt()
    white = vectors[:, keep] / values[keep].sqrt() @ turn

    def psi() -> Iterator[Tensor]:
        for chunk in chunks(fake):
            d = chunk - a.mean
            yield 2 * d @ (a.mean - b.mean) + d.square().sum(1) - (d @ white).square() @ inner

    return _influence(_distance(a, b, inner.sum()), psi(), strata)


def _same_width(a: Moments, b: Moments) -> None:
    if len(a.mean) != len(b.mean):
        raise ValueError(f"the sets have {len(a.mean)} and {len(b.mean)} features; they must come from one extractor")


def _root(cov: Tensor) -> Tensor:
    values, vectors = _eigen(cov, "the covariance")
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _eigen(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix. ValueError for NaN and infinite values."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # torch raises it for some matrices with NaN
        values = vectors = torch.tensor([math.nan])
    if not (torch.isfinite(values).all() and torch.isfinite(vectors).all()):
        raise ValueError(f"{name} has no finite eigenvalues; the features or the reference are too large, or NaN")
    return values, vectors


def _eigenvalues(matrix: Tensor, name: str) -> Tensor:
    return _eigen(matrix, name)[0]


def _distance(a: Moments, b: Moments, cross: Tensor) -> float:
    value = ((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross).item()
    if not math.isfinite(value):
        raise ValueError(f"the distance is {value}; the features or the reference are too large, or NaN")
    return max(0.0, value)  # a negative one is rounding


def _influence(value: float, psi: Iterable[Tensor], strata: Tensor | None = None) -> Score:
    """The interval of the influences psi, in parts, by running sums within strata."""
    names, where = (torch.zeros(1), None) if strata is None else strata.unique(return_inverse=True)
    sums, sizes = (torch.zeros(len(names), dtype=torch.float64) for _ in range(2))
    n, squares = 0, 0.0
    for part in psi:
        into = torch.zeros(len(part), dtype=torch.long) if where is None else where[n : n + len(part)]
        sums.index_add_(0, into, part)
        sizes.index_add_(0, into, torch.ones_like(part))
        squares += part.square().sum().item()
        n += len(part)
    within = squares - (sums.square() / sizes.clamp(min=1)).sum().item()
    if not math.isfinite(within):
        raise ValueError(f"the variance of the figure {value} is {within}; the features are too large, or NaN")
    half = Z * math.sqrt(max(0.0, within) / max(1, n - len(names)) / n)
    return score(value, value - half, value + half, n)


# Kernel distances


def kid(
    fake: Set, real: Set, strata: Tensor | None = None, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> Score:
    """Kernel distance (Binkowski et al. 2018, arXiv 1801.01401): unbiased MMD^2 of the kernel (x.y / D + 1)^3.

    The mean over subsets of `size` images (of all, where there are fewer), drawn as torch-fidelity draws them.
    Influence: psi = 2 (E k(x, fake) - E k(x, real)). Unbiased in n; it may be negative. ValueError for NaN, n < 2.
    """
    width, n, m = _pair(fake, real, 2), count(fake), count(real)
    size = min(size, n, m)
    whole = size == n == m  # every subset is the whole
    pick = np.random.RandomState(seed)
    total, psi, drawn = 0.0, torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    times = 1 if whole else subsets
    for _ in range(times):
        i, j = (torch.from_numpy(pick.choice(k, size, replace=False)) for k in (n, m))
        x, y = rows(fake, i), rows(real, j)
        kxx, kyy, kxy = ((u @ v.T / width + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        kxx.fill_diagonal_(0)
        kyy.fill_diagonal_(0)
        pairs = size * (size - 1)
        total += (kxx.sum() / pairs + kyy.sum() / pairs - 2 * kxy.mean()).item()
        psi[i] += 2 * (kxx.sum(1) / (size - 1) - kxy.mean(1))
        drawn[i] += 1
    seen = drawn > 0
    found = _influence(total / times, [(psi / drawn)[seen]], None if strata is None else strata[seen])
    return found._replace(n=n)


def cmmd(fake: Set, real: Set, strata: Tensor | None = None, sigma: float = 10.0) -> Score:
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603): 1000 MMD^2 of a Gaussian kernel on CLIP embeddings of length 1.

    The biased estimator of the authors' code (with the diagonal), by blocks of images. Influence as in `kid`.
    """
    _pair(fake, real, 2)

    def near(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp((x @ y.T - 1) / sigma**2)  # |x - y|^2 = 2 - 2 x.y

    def means(x: Set, y: Set) -> Tensor:
        """E over y of k(x_i, y), [N]."""
        out = []
        for a in _unit(chunks(x)):
            out.append(torch.stack([near(a, b).sum(1) for b in _unit(chunks(y))]).sum(0) / count(y))
        return torch.cat(out)

    own, cross, other = means(fake, fake), means(fake, real), means(real, real)
    value = 1000 * (own.mean() + other.mean() - 2 * cross.mean()).item()
    return _influence(value, [2000 * (own - cross)], strata)


def _unit(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    yield from (torch.nn.functional.normalize(part, dim=1) for part in parts)


# Nearest neighbours


def manifold(
    fake: Set,
    real: Set,
    strata: Tensor | None = None,
    k: int = 3,
    k_density: int = 5,
    limit: int = 10_000,
    seed: int = 0,
) -> dict[str, Score]:
    """precision, recall, density, coverage and off_support, of at most `limit` images of equal number on both sides.

    precision, recall: the share of fakes within the k-th-neighbour balls of the reference, and of the reference within
    those of the fakes (Kynkaanniemi et al. 2019, arXiv 1904.06991). density, coverage: in how many of the
    reference's balls (k_density) a fake lies, over k_density; the share of them that hold one (Naeem et al. 2020, arXiv
    2002.09797).
    off_support: the share of fakes farther from the reference than 99 % of the reference from the rest of it (mode
    interpolation, Aithal et al. 2024, arXiv 2406.09358; ours in feature space). All depend on n. Intervals: Wilson for
    precision and off_support, halving for the others. ValueError for NaN or n <= k.
    """
    _pair(fake, real, max(k, k_density) + 2)
    n = min(count(fake), count(real), limit)
    picked = draw(count(fake), n, seed)
    fakes, reals = rows(fake, picked), rows(real, draw(count(real), n, seed))
    ff, rr, fr = _squared(fakes, fakes), _squared(reals, reals), _squared(fakes, reals)
    ball, wide = _radius(rr, k), _radius(rr, k_density)
    inside = (fr <= ball).any(1)
    edge = _radius(rr, 1).quantile(0.99)
    far = fr.min(1).values > edge
    halves = Halves(n, None if strata is None else strata[picked], seed)

    def recall(i: Tensor) -> float:
        return (fr[i] <= _radius(ff[i][:, i], k)[:, None]).any(0).double().mean().item()

    def density(i: Tensor) -> float:
        return ((fr[i] < wide).sum(1).double().mean() / k_density).item()

    def coverage(i: Tensor) -> float:
        return (fr[i].min(0).values < wide).double().mean().item()

    return {
        "precision": share(inside),
        "recall": halves(recall, 1.0),
        "density": halves(density),
        "coverage": halves(coverage, 1.0),
        "off_support": share(far),
    }


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [N, M], exactly 0 between equal rows; stored in float32."""
    a, b, out = x.square().sum(1), y.square().sum(1), torch.empty(len(x), len(y))
    for i in range(0, len(x), 1000):
        d = a[i : i + 1000, None] + b - 2 * x[i : i + 1000] @ y.T
        scale = a[i : i + 1000, None] + b
        out[i : i + 1000] = torch.where(d < 1e-13 * scale, 0.0, d)
    if not torch.isfinite(out).all():
        raise ValueError("distances of features overflow float32; the features are too large")
    return out


def _radius(distances: Tensor, k: int) -> Tensor:
    return distances.kthvalue(k + 1, dim=1).values  # the nearest is the sample itself


class Halves:
    """Intervals by halving; `halves(statistic)` for a statistic of the indices of some images, at most `top`."""

    def __init__(self, n: int, strata: Tensor | None = None, seed: int = 0, repeats: int = 10) -> None:
        source = torch.Generator().manual_seed(seed)
        self.n, self.orders = n, [torch.randperm(n, generator=source) for _ in range(repeats)]
        if strata is not None:  # neighbours in the order, of one stratum, go to different halves
            self.orders = [order[strata[order].argsort(stable=True)] for order in self.orders]

    def __call__(self, statistic: Callable[[Tensor], float], top: float = math.inf) -> Score:
        value = statistic(torch.arange(self.n))
        moved = [statistic(order[::2]) - statistic(order[1::2]) for order in self.orders]
        spread = Z * math.sqrt(sum(d * d for d in moved) / len(moved)) / 2
        found = score(value, value - spread, value + spread, self.n)
        return found._replace(low=max(0.0, found.low), high=min(top, found.high))


def share(hits: Tensor) -> Score:
    """The share of True among [N], with Wilson's interval (1927), which has a width at 0 and 1 too."""
    if not len(hits):
        raise ValueError("a share of no images is not defined; generate some")
    n, p = len(hits), hits.double().mean().item()
    centre, half = (p + Z**2 / (2 * n)), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = ((centre + side * half) / (1 + Z**2 / n) for side in (-1, 1))
    return score(p, min(low, p), max(high, p), n)


def average(values: Tensor) -> Score:
    """The mean of [N] independent values with its interval of Student's t. ValueError for fewer than 2 or NaN."""
    from eval.metrics.intervals import mean_ci

    found = mean_ci(values.tolist())
    return score(found.mean, found.low, found.high, found.n)


# Classifiers


def inception_score(logits: Set, splits: int = 10, seed: int = 2020) -> Score:
    """exp E KL(p(y|x) | p(y)) (Salimans et al. 2016, arXiv 1606.03498): the mean over disjoint splits, t interval.

    logits [N, K]. The images are shuffled as torch-fidelity shuffles them. ValueError for fewer than 2 a split.
    """
    n = count(logits)
    check(logits, "generated", 2 * splits, "logits")
    whole = torch.cat(list(chunks(logits, "logits")))
    whole = whole[torch.from_numpy(np.random.RandomState(seed).permutation(n))]
    log_p = whole.log_softmax(1)
    found = []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        marginal = part.exp().mean(0).log()
        found.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    if splits == 1:
        return Score(found[0].item(), -math.inf, math.inf, n)
    return average(torch.stack(found))._replace(n=n)


def accuracy(logits: Tensor, labels: Tensor) -> Score:
    """The share of images whose largest logit [N, K] is at the label [N] that was asked for."""
    if len(logits) != len(labels) or not len(labels):
        raise ValueError(f"{len(logits)} logits and {len(labels)} labels; one label per image is needed")
    check(logits, "generated", 1)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels are {labels.min()} .. {labels.max()}, of {logits.shape[1]} classes; from 0 on")
    return share(logits.argmax(1) == labels)


# Text and diversity


def text_score(images: Set, texts: Set, scale: float = 1.0) -> Score:
    """scale times the mean cosine of image i and prompt i (Hessel et al. 2021, arXiv 2104.08718, not cut at 0)."""
    _pair(images, texts, 2)
    if count(images) != count(texts):
        raise ValueError(f"{count(images)} images and {count(texts)} prompts; one prompt per image is needed")
    found = [(a * b).sum(1) for a, b in zip(_unit(chunks(images)), _unit(chunks(texts)))]
    return average(scale * torch.cat(found))


def vendi(x: Set, strata: Tensor | None = None) -> Score:
    """Vendi score (Friedman & Dieng 2022, arXiv 2210.02410): exp of the entropy of the eigenvalues of K / n, cosine K.

    The effective number of different images, by the D x D matrix M = E x x^T that has the same eigenvalues. Influence:
    psi = score (-x.log(M) x - H). It grows with n until the model's modes are seen.
    """
    width = check(x, "generated", 2)
    second = torch.zeros(width, width, dtype=torch.float64)
    for part in _unit(chunks(x)):
        second += part.T @ part / count(x)
    values, vectors = _eigen(second, "the matrix of cosines")
    keep = values > 1e-12
    values, vectors = values[keep], vectors[:, keep]
    entropy = -(values * values.log()).sum()
    number = entropy.exp()
    psi = (number * (-((part @ vectors).square() @ values.log()) - entropy) for part in _unit(chunks(x)))
    return _influence(number.item(), psi, strata)


def diversity(x: Set, prompts: Tensor) -> Score:
    """The mean over prompts of the mean 1 - cosine of two images of one prompt and different seeds.

    prompts [N]: the number of each image's prompt. Interval: t over prompts. ValueError where none has two images.
    """
    check(x, "generated", 2)
    ids, where, sizes = prompts.unique(return_inverse=True, return_counts=True)
    if len(prompts) != count(x) or not (sizes > 1).any():
        raise ValueError("diversity needs one prompt number an image, and two images of some prompts")
    total, seen = torch.zeros(0), 0
    for part in _unit(chunks(x)):
        total = part.new_zeros(len(ids), part.shape[1]) if not len(total) else total
        total.index_add_(0, where[seen : seen + len(part)], part)
        seen += len(part)
    total, sizes = total[sizes > 1], sizes[sizes > 1].double()
    similar = (total.square().sum(1) - sizes) / (sizes * (sizes - 1))
    return average(1 - similar)._replace(n=count(x))


def pair_diversity(
    images: Callable[[int], Tensor], prompts: Tensor, distance: Callable[[Tensor, Tensor], Tensor]
) -> Score:
    """As `diversity` by a distance of two images, such as LPIPS (Zhang et al. 2018, arXiv 1801.03924).

    images(i) -> [1, C, H, W] in [-1, 1]; distance(a, b) -> [1]. All pairs of a prompt; t over prompts.
    """
    found = []
    for prompt in prompts.unique():
        mine = (prompts == prompt).nonzero()[:, 0].tolist()
        pictures = [images(i) for i in mine]
        pairs = [(a, b) for i, a in enumerate(pictures) for b in pictures[:i]]
        if pairs:
            with torch.no_grad():
                found.append(torch.stack([distance(a, b).reshape(()).double().cpu() for a, b in pairs]).mean())
    if not found:
        raise ValueError("diversity needs two images of some prompts; generate several seeds of a prompt")
    return average(torch.stack(found))._replace(n=len(prompts))


# The table


@dataclass
class Given:
    """What metrics may ask for: the outputs for the generated images, the reference, prompts."""

    fake: Set
    real: Set | Moments | None = None
    labels: Tensor | None = None  # [N], what was asked for
    prompts: Tensor | None = None  # [N], the number of each image's prompt
    texts: Set | None = None  # [N, D], of each image's prompt
    scale: float = 1.0  # exp of CLIP's logit scale
    picture: Callable[[int], Tensor] | None = None  # i -> [1, C, H, W] in [-1, 1]
    distance: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def reference(self) -> Set:
        if self.real is None or isinstance(self.real, Moments):
            raise ValueError("this metric needs a folder of reference images, not their mean and covariance alone")
        return self.real

    @cached_property
    def manifold(self) -> dict[str, Score]:
        return manifold(self.fake, self.reference, self.strata)

    @property
    def strata(self) -> Tensor | None:
        """Labels, if each has at least two images."""
        few = self.labels is None or self.labels.unique(return_counts=True)[1].min() < 2
        return None if few else self.labels


@dataclass(frozen=True)
class Metric:
    """An entry of the table."""

    compute: Callable[[Given], Score | dict[str, Score]]
    extractor: str  # by default
    better: Literal["lower", "higher"]
    interval: Literal["influence", "halving", "mean", "splits"]
    source: str
    needs: tuple[str, ...] = ()  # of reference, labels, texts, seeds (several images of a prompt)
    least: int | None = 2  # images that it needs on each side; None: one more than there are features
    patch: int | None = None  # the extractor sees the centre of this size
    run: bool = False  # whether it was ever run here with the real weights of its extractor

    @property
    def description(self) -> str:
        untried = "" if self.run else "; never run here with its real weights (python -m eval.verify compares)"
        return f"{self.source}; {self.better} is better; interval by {self.interval}{untried}"


def _named(*names: str) -> Callable[[Given], dict[str, Score]]:
    return lambda g: {name: g.manifold[name] for name in names}


def _texts(g: Given) -> Score:
    assert g.texts is not None
    return text_score(g.fake, g.texts)


def _scaled(g: Given) -> Score:
    assert g.texts is not None
    return text_score(g.fake, g.texts, g.scale)


def _accuracy(g: Given) -> Score:
    assert g.labels is not None
    return accuracy(torch.cat(list(chunks(g.fake, "logits"))), g.labels)


def _diversity(g: Given) -> Score:
    assert g.prompts is not None
    return diversity(g.fake, g.prompts)


def _lpips(g: Given) -> Score:
    assert g.prompts is not None and g.picture is not None and g.distance is not None
    return pair_diversity(g.picture, g.prompts, g.distance)


def _fid(g: Given) -> Score:
    assert g.real is not None
    return fid(g.fake, g.real, g.strata)


REFERENCE = ("reference",)
NEIGHBOURS = 7  # images that manifold() needs
FRECHET = "Heusel et al. 2017, arXiv 1706.08500"
G14, L336 = "open_clip:ViT-g-14/laion2b_s12b_b42k", "clip:openai/clip-vit-large-patch14-336"

METRICS: dict[str, Metric] = {
    "fid": Metric(_fid, "inception-clean", "lower", "influence", f"{FRECHET}; resize of clean-fid", REFERENCE, None),
    "patch_fid": Metric(
        _fid, "inception-clean", "lower", "influence", "Lin et al. 2024, arXiv 2402.13929; 299 centre", REFERENCE,
        None, 299,
    ),
    "fd_dinov2": Metric(
        _fid, "dinov2", "lower", "influence", "Stein et al. 2023, arXiv 2306.04675; DINOv2 ViT-L/14", REFERENCE, None
    ),
    "fd_heldout": Metric(
        _fid, "digits", "lower", "influence", f"{FRECHET}; 597 held-out digits", REFERENCE, None, run=True
    ),
    "fd_train": Metric(_fid, "digits", "lower", "influence", f"{FRECHET}; 1,200 digits", REFERENCE, None, run=True),
    "kid": Metric(
        lambda g: kid(g.fake, g.reference, g.strata),
        "inception-clean", "lower", "influence", "Binkowski et al. 2018, arXiv 1801.01401", REFERENCE,
    ),
    "cmmd": Metric(
        lambda g: cmmd(g.fake, g.reference, g.strata),
        L336, "lower", "influence", "Jayasumana et al. 2024, arXiv 2401.09603", REFERENCE,
    ),
    "precision_recall": Metric(
        _named("precision", "recall"),
        "inception-clean", "higher", "halving", "Kynkaanniemi et al. 2019, arXiv 1904.06991; k = 3", REFERENCE,
        NEIGHBOURS,
    ),
    "density_coverage": Metric(
        _named("density", "coverage"),
        "inception-clean", "higher", "halving", "Naeem et al. 2020, arXiv 2002.09797; k = 5", REFERENCE, NEIGHBOURS,
    ),
    "off_support": Metric(
        _named("off_support"),
        "inception-clean", "lower", "mean", "after Aithal et al. 2024, arXiv 2406.09358; ours", REFERENCE, NEIGHBOURS,
    ),
    "inception_score": Metric(
        lambda g: inception_score(g.fake),
        "inception-logits", "higher", "splits", "Salimans et al. 2016, arXiv 1606.03498", (), 20,
    ),
    "accuracy": Metric(
        _accuracy, "digits", "higher", "mean", "the label that was asked for", ("labels",), 1, run=True
    ),
    "clip_score": Metric(_texts, G14, "higher", "mean", "Hessel et al. 2021, arXiv 2104.08718", ("texts",)),
    "hpsv2": Metric(_texts, "hpsv2", "higher", "mean", "Wu et al. 2023, arXiv 2306.09341", ("texts",)),
    "pickscore": Metric(_scaled, "pickscore", "higher", "mean", "Kirstain et al. 2023, arXiv 2305.01569", ("texts",)),
    "vendi": Metric(
        lambda g: vendi(g.fake, g.strata), "dinov2", "higher", "influence", "Friedman & Dieng 2022, arXiv 2210.02410"
    ),
    "dino_diversity": Metric(_diversity, "dinov2", "higher", "mean", "mean 1 - cosine within a prompt", ("seeds",)),
    "lpips_diversity": Metric(_lpips, "lpips", "higher", "mean", "Zhang et al. 2018, arXiv 1801.03924", ("seeds",)),
}  # fmt: skip


def metric(name: str) -> Metric:
    """An entry of the table; ValueError with all names for another one."""
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]
