"""`METRICS`: each metric with its extractor, direction, interval (eval/metrics/intervals.py) and source.

It imports no library that takes time: the functions import what they call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from eval.metrics.frechet import Moments
    from eval.metrics.intervals import Score
    from eval.metrics.sets import Set


PIXELS = "pixels"  # the extractor of metrics that read images alone


@dataclass
class MetricInputs:
    """The inputs of metrics: features of the generated images, of the reference and of the prompts."""

    fake: Set
    real: Set | Moments | None = None
    labels: Tensor | None = None  # [N], what was asked for
    prompts: Tensor | None = None  # [N], the number of each image's prompt
    texts: Set | None = None  # [N, D], of each image's prompt
    scale: float = 1.0  # exp of CLIP's logit scale
    picture: Callable[[int], Tensor] | None = None  # i -> [1, C, H, W] in [-1, 1]
    distance: Callable[[Tensor, Tensor], Tensor] | None = None
    teacher: Callable[[int], Tensor] | None = None  # as picture, of the teacher's image with the same prompt and noise
    count: int = 0  # generated images

    @property
    def reference(self) -> Set:
        from eval.metrics.frechet import Moments

        if self.real is None or isinstance(self.real, Moments):
            raise ValueError("this metric needs a folder of reference images, not their mean and covariance alone")
        return self.real

    @cached_property
    def manifold(self) -> dict[str, Score]:
        from eval.metrics.neighbours import manifold

        return manifold(self.fake, self.reference, self.strata)

    @property
    def strata(self) -> Tensor | None:
        """Labels, if each has at least two images."""
        few = self.labels is None or self.labels.unique(return_counts=True)[1].min() < 2
        return None if few else self.labels


@dataclass(frozen=True)
class Metric:
    """An entry of the table."""

    compute: Callable[[MetricInputs], Score | dict[str, Score]]
    extractor: str  # by default
    better: Literal["lower", "higher", "neither"]
    interval: Literal["influence", "halving", "mean", "splits"]
    source: str
    needs: tuple[str, ...] = ()  # of reference, labels, texts, seeds (several images of a prompt), teacher
    least: int | None = 2  # images that it needs on each side; None: one more than there are features
    patch: int | None = None  # the extractor sees the centre of this size
    run: bool = False  # whether it was ever run here with the real weights of its extractor

    @property
    def description(self) -> str:
        tried = self.run or self.extractor == PIXELS
        untried = "" if tried else "; never run here with its real weights (python -m eval.verify compares)"
        better = "no value" if self.better == "neither" else self.better
        return f"{self.source}; {better} is better; interval by {self.interval}{untried}"


def _from_manifold(*names: str) -> Callable[[MetricInputs], dict[str, Score]]:
    return lambda g: {name: g.manifold[name] for name in names}


def _fid(g: MetricInputs) -> Score:
    from eval.metrics.frechet import fid

    assert g.real is not None
    return fid(g.fake, g.real, g.strata)


def _kid(g: MetricInputs) -> Score:
    from eval.metrics.kernel import kid

    return kid(g.fake, g.reference, g.strata)


def _cmmd(g: MetricInputs) -> Score:
    from eval.metrics.kernel import cmmd

    return cmmd(g.fake, g.reference, g.strata)


def _inception_score(g: MetricInputs) -> Score:
    from eval.metrics.classifier import inception_score

    return inception_score(g.fake)


def _accuracy(g: MetricInputs) -> Score:
    import torch

    from eval.metrics.classifier import accuracy
    from eval.metrics.sets import chunks

    assert g.labels is not None
    return accuracy(torch.cat(list(chunks(g.fake, "logits"))), g.labels)


def _text_score(g: MetricInputs) -> Score:
    from eval.metrics.text import text_score

    assert g.texts is not None
    return text_score(g.fake, g.texts)


def _scaled_text_score(g: MetricInputs) -> Score:
    from eval.metrics.text import text_score

    assert g.texts is not None
    return text_score(g.fake, g.texts, g.scale)


def _vendi(g: MetricInputs) -> Score:
    from eval.metrics.diversity import vendi

    return vendi(g.fake, g.strata)


def _diversity(g: MetricInputs) -> Score:
    from eval.metrics.diversity import diversity

    assert g.prompts is not None
    return diversity(g.fake, g.prompts)


def _lpips(g: MetricInputs) -> Score:
    from eval.metrics.diversity import pair_diversity

    assert g.prompts is not None and g.picture is not None and g.distance is not None
    return pair_diversity(g.picture, g.prompts, g.distance)


def _colour(g: MetricInputs) -> dict[str, Score]:
    from eval.metrics.colour import colour

    assert g.picture is not None
    return colour(g.picture, g.count)


def _drift(g: MetricInputs) -> dict[str, Score]:
    from eval.metrics.colour import drift

    assert g.picture is not None and g.teacher is not None
    return drift(g.picture, g.teacher, g.count)


REFERENCE = ("reference",)
NEIGHBOURS = 7  # images that manifold() needs
FRECHET = "Heusel et al. 2017, arXiv 1706.08500"
G14 = "open_clip:ViT-g-14/laion2b_s12b_b42k"
L336 = "clip:openai/clip-vit-large-patch14-336"

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
        _kid,
        "inception-clean", "lower", "influence", "Binkowski et al. 2018, arXiv 1801.01401", REFERENCE,
    ),
    "cmmd": Metric(
        _cmmd,
        L336, "lower", "influence", "Jayasumana et al. 2024, arXiv 2401.09603", REFERENCE,
    ),
    "precision_recall": Metric(
        _from_manifold("precision", "recall"),
        "inception-clean", "higher", "halving", "Kynkaanniemi et al. 2019, arXiv 1904.06991; k = 3", REFERENCE,
        NEIGHBOURS,
    ),
    "density_coverage": Metric(
        _from_manifold("density", "coverage"),
        "inception-clean", "higher", "halving", "Naeem et al. 2020, arXiv 2002.09797; k = 5", REFERENCE, NEIGHBOURS,
    ),
    "off_support": Metric(
        _from_manifold("off_support"),
        "inception-clean", "lower", "mean", "after Aithal et al. 2024, arXiv 2406.09358; ours", REFERENCE, NEIGHBOURS,
    ),
    "inception_score": Metric(
        _inception_score,
        "inception-logits", "higher", "splits", "Salimans et al. 2016, arXiv 1606.03498", (), 20,
    ),
    "accuracy": Metric(
        _accuracy, "digits", "higher", "mean", "the label that was asked for", ("labels",), 1, run=True
    ),
    "clip_score": Metric(_text_score, G14, "higher", "mean", "Hessel et al. 2021, arXiv 2104.08718", ("texts",)),
    "hpsv2": Metric(_text_score, "hpsv2", "higher", "mean", "Wu et al. 2023, arXiv 2306.09341", ("texts",)),
    "pickscore": Metric(
        _scaled_text_score, "pickscore", "higher", "mean", "Kirstain et al. 2023, arXiv 2305.01569", ("texts",)
    ),
    "vendi": Metric(
        _vendi, "dinov2", "higher", "influence", "Friedman & Dieng 2022, arXiv 2210.02410"
    ),
    "dino_diversity": Metric(_diversity, "dinov2", "higher", "mean", "mean 1 - cosine within a prompt", ("seeds",)),
    "colour": Metric(_colour, PIXELS, "neither", "mean", "CIELAB's mean chroma, and the spread of its lightness"),
    "drift": Metric(
        _drift, PIXELS, "neither", "mean", "difference from the teacher's image of the same noise in chroma, contrast, "
        "mean and spread of each channel", ("teacher",),
    ),
    "lpips_diversity": Metric(_lpips, "lpips", "higher", "mean", "Zhang et al. 2018, arXiv 1801.03924", ("seeds",)),
}  # fmt: skip
