"""What the figures of a folder need: protocol, real images, labels, prompts, weights. It imports no network.

A missing input is reported before a library that takes time is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from eval.features.weights import require_extractor
from eval.images.manifest import Manifest, read_manifest
from eval.metrics.lookup import choose_extractor, column_name, find_metric
from eval.metrics.registry import PIXELS
from eval.protocol import Protocol
from eval.protocol_files import is_file_name
from eval.protocols import find_protocol

ALONE = ("fd_heldout", "fd_train", "lpips_diversity")  # they share no input with other metrics
NEEDS = {
    "labels": "labels",
    "texts": "prompts (metadata.jsonl)",
    "seeds": "two images of each of two prompts",
    "teacher": "teacher's images with its prompts and noise (--teacher)",
}
DIGITS = [8, 8]  # height and width of a digit
CHOICE = "choose a protocol by --protocol NAME or FILE.yaml, or metrics by --metrics, for example --metrics kid"


def choose_protocol(folder: Path, manifest: Manifest, name: str | None, metrics: Sequence[str] = ()) -> Protocol:
    """The named protocol, else the one that the folder was made for, else digits, with some of its metrics.

    ValueError if the protocol does not exist, measures none of the metrics, or is digits for other images than 8 x 8.
    """
    p = find_protocol(name or _stored_protocol(folder, manifest))
    if not metrics:
        return p
    measures = tuple(m for m in p.measures if m.metric in metrics or column_name(m.metric) in metrics)
    if not measures:
        raise ValueError(f"protocol {p.name} measures none of {', '.join(metrics)}; leave --protocol out to choose")
    return replace(p, measures=measures)


def _stored_protocol(folder: Path, manifest: Manifest) -> str:
    """The protocol that a folder was made for, else digits. ValueError if its file is gone, or for other images."""
    stored = manifest.get("protocol")
    if not stored:
        if (manifest.get("shape") or [0])[1:] != DIGITS:
            raise ValueError(f"{folder} was made for no protocol: {CHOICE}")
        return "digits"
    if is_file_name(stored) and not Path(stored).is_file():
        raise ValueError(
            f"{folder} was made for the protocol {stored}, which is not there: name its place by --protocol"
        )
    return str(stored)


def require_inputs(
    folder: Path,
    protocol: str | None,
    metrics: Sequence[str],
    extractor: str | None,
    reference: Path | None,
    use: Sequence[str],
    teacher: Sequence[Path] = (),
) -> None:
    """ValueError if no metric of a folder can be computed. Arguments: see eval.score."""
    manifest = read_manifest(folder)
    swaps = read_swaps(use)
    for name in metrics:
        find_metric(name)
    if metrics and protocol is None:
        specs = {name: choose_extractor(find_metric(name), extractor) for name in metrics}
        specs = {name: swaps.get(spec, spec) for name, spec in specs.items()}
        require_reference(metrics, reference)
    else:
        p = choose_protocol(folder, manifest, protocol, metrics)
        p.require(reference=reference is None)
        specs = {m.metric: swaps.get(m.extractor, m.extractor) for m in p.measures}
    reasons: dict[str, str] = {}
    for name, spec in specs.items():
        try:
            _require_metric(folder, manifest, name, spec, bool(teacher))
        except ValueError as error:
            reasons[name] = str(error)
    if len(reasons) == len(specs):
        raise ValueError(f"{folder}: {format_reasons(reasons)}")


def require_reference(metrics: Sequence[str], reference: Path | None) -> None:
    """ValueError if a metric without a protocol lacks real images."""
    for name in metrics:
        if "reference" in find_metric(name).needs and reference is None and name not in ALONE:
            raise ValueError(f"metric {name} compares with real images: name their folder by --reference")


def _require_metric(folder: Path, manifest: Manifest, name: str, spec: str, teacher: bool) -> None:
    """ValueError if labels, prompts, the package or the weights of a metric are missing."""
    entry = find_metric(name)
    there = {
        "teacher": teacher,
        "labels": manifest.get("labels") is not None,
        "texts": (folder / "metadata.jsonl").is_file(),
    }
    if lacks := [need for need in entry.needs if not there.get(need, True)]:
        raise ValueError(describe_lack(folder, name, lacks))
    if entry.extractor != PIXELS:
        require_extractor("lpips" if entry.extractor == "lpips" and spec != "random" else spec)


def describe_lack(folder: Path, metric: str, lacks: Sequence[str]) -> str:
    """The message on inputs that a folder does not have."""
    return f"{folder} has no {' and '.join(NEEDS[need] for need in lacks)}, which {metric} needs"


def read_swaps(use: Sequence[str]) -> dict[str, str]:
    """{extractor: the one used instead} of texts EXTRACTOR=EXTRACTOR. ValueError for other texts."""
    swaps = {}
    for text in use:
        left, equals, right = text.partition("=")
        if not (left and equals and right):
            raise ValueError(
                f"--use {text}: write EXTRACTOR=EXTRACTOR, such as inception-clean=inception-clean:some/file.pt"
            )
        swaps[left] = right
    return swaps


def format_reasons(left_out: Mapping[str, str]) -> str:
    """{metric: reason} as text, with each reason once."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(some)}: {reason}" for reason, some in names.items())
