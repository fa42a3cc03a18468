"""Compare our figures with those of other libraries, on your images, with the real weights, on this machine.

python -m eval.verify --folder runs/images/a --reference photos
python -m eval.verify --folder runs/images/a --reference photos --peers clip --clip_model open_clip:ViT-L-14/openai

arithmetic      torch-fidelity's FID, KID, Inception Score, precision and recall of our features and logits
clean-fid       its reading, resizing and network, to FID, against `inception-clean`
torch-fidelity  its reading, its own conversion of the network's weights, to FID, against `inception-legacy`
clip            open_clip's transform, tokenizer and encoders, to the mean cosine, against `clip_score`

A comparison without its weights or package is left out, with the reason. The exit code is 1 if a figure differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from eval.features.extraction import features, text_features
from eval.features.extractors import device, load
from eval.features.weights import cache_folder
from eval.files import check_output, write_json
from eval.images.images import list_images
from eval.metrics.classifier import inception_score
from eval.metrics.frechet import fid, frechet
from eval.metrics.kernel import kid
from eval.metrics.neighbours import manifold
from eval.metrics.text import text_score

Peer = Literal["arithmetic", "clean-fid", "torch-fidelity", "clip"]


class Comparison(NamedTuple):
    """Our figure, a peer's figure, and the relative difference that is allowed."""

    name: str
    ours: float
    theirs: float
    allowed: float

    @property
    def difference(self) -> float:
        return abs(self.ours - self.theirs) / max(abs(self.theirs), 1e-12)

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed


def arithmetic(folder: Path, reference: Path, extractor: str, logits: str) -> Iterator[Comparison]:
    """Figures of the same features. Tolerance: 1e-6."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    fake, real = (features(path, load(extractor)) for path in (folder, reference))
    a = fake.rows()
    b = real.rows()
    size = min(1000, len(a), len(b))
    n = min(len(a), len(b), 10_000)
    statistics = [fid_features_to_statistics(x) for x in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)
    theirs |= kid_features_to_metric(a, b, kid_subset_size=size, verbose=False)
    theirs |= prc_features_to_metric(a[:n], b[:n], verbose=False)
    ours = manifold(a[:n], b[:n])
    yield Comparison("fid", fid(fake, real).value, theirs["frechet_inception_distance"], 1e-6)
    yield Comparison("kid", kid(fake, real, size=size).value, theirs["kernel_inception_distance_mean"], 1e-6)
    yield Comparison("precision", ours["precision"].value, theirs["precision"], 1e-6)
    yield Comparison("recall", ours["recall"].value, theirs["recall"], 1e-6)
    outputs = features(folder, load(logits))
    score = isc_features_to_metric(outputs.rows(key="logits"))["inception_score_mean"]
    yield Comparison("inception_score", inception_score(outputs).value, score, 1e-6)


def clean_fid(folder: Path, reference: Path) -> Iterator[Comparison]:
    """From files by clean-fid's own reader, resizer and wrapper of the network; float32 networks, 1e-4."""
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    net = load("inception-clean")  # first: it says where the weights belong
    model = InceptionV3W(str(cache_folder()), download=False).to(device())
    how: dict[str, Any] = {"num_workers": 0, "device": device(), "mode": "clean", "verbose": False}
    theirs = [torch.from_numpy(get_folder_features(str(path), model, **how)) for path in (folder, reference)]
    ours = [features(path, net) for path in (folder, reference)]
    yield Comparison("fid", frechet(*ours), frechet(*theirs), 1e-4)


def torch_fidelity(folder: Path, reference: Path) -> Iterator[Comparison]:
    """torch-fidelity's whole run, with the weights that it fetches; its resizing is TensorFlow's as well, 1e-3."""
    from torch_fidelity import calculate_metrics

    ours = frechet(*(features(path, load("inception-legacy")) for path in (folder, reference)))
    cuda = device().type == "cuda"
    result = calculate_metrics(input1=str(folder), input2=str(reference), fid=True, cuda=cuda, verbose=False)
    yield Comparison("fid", ours, result["frechet_inception_distance"], 1e-3)


def clip(folder: Path, spec: str) -> Iterator[Comparison]:
    """The mean cosine of images and prompts by open_clip's own pipeline, and the transform's pixels; 1e-4."""
    import open_clip
    from PIL import Image

    from eval.figures import Folder

    name, _, weights = spec.partition(":")
    if name != "open_clip":
        raise ValueError(f"{spec} is not of open_clip; name open_clip:MODEL/WEIGHTS")
    texts = Folder(folder).texts
    if texts is None:
        raise ValueError(f"{folder} has no prompts (metadata.jsonl)")
    net = load(spec)
    ours = text_score(features(folder, net), text_features(texts, net)).value
    local = weights.startswith("local-dir:")
    kind, _, tag = (weights, "", "") if local else weights.partition("/")
    model, transform = open_clip.create_model_from_pretrained(kind, tag or None, device=device())
    tokenizer = open_clip.get_tokenizer(kind)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for file, text in zip(list_images(folder), texts):
            image = model.encode_image(transform(Image.open(file))[None].to(device()), normalize=True)
            words = model.encode_text(tokenizer([text]).to(device()), normalize=True)
            total += (image.double() * words.double()).sum().cpu()
    yield Comparison("clip_score", ours, (total / len(texts)).item(), 1e-4)


def verify(
    folder: Path,
    reference: Path | None = None,
    peers: tuple[Peer, ...] = ("arithmetic", "clean-fid", "torch-fidelity", "clip"),
    extractor: str = "inception-clean",
    logits: str = "inception-logits",
    clip_model: str = "open_clip:ViT-g-14/laion2b_s12b_b42k",
    out: Path | None = None,
) -> tuple[dict[str, list[Comparison]], dict[str, str]]:
    """Compare with the peers -> ({peer: its comparisons}, {peer: the reason why it was left out}).

    Args:
        folder: generated images, with metadata.jsonl for clip.
        reference: real images, for all but clip.
        peers: whom to compare with.
        extractor: whose features arithmetic compares on.
        logits: whose logits arithmetic compares on.
        clip_model: of open_clip.
        out: where the comparison goes, as JSON.
    """
    list_images(folder)
    if out is not None:
        check_output(out, "--out")
    comparisons: dict[str, list[Comparison]] = {}
    missing: dict[str, str] = {}
    for peer in peers:
        try:
            if peer == "clip":
                comparisons[peer] = list(clip(folder, clip_model))
            elif reference is None:
                raise ValueError("it compares with real images: name their folder by --reference")
            elif peer == "arithmetic":
                comparisons[peer] = list(arithmetic(folder, reference, extractor, logits))
            else:
                compare = {"clean-fid": clean_fid, "torch-fidelity": torch_fidelity}[peer]
                comparisons[peer] = list(compare(folder, reference))
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            missing[peer] = (str(error) or type(error).__name__).splitlines()[0]
    if out is not None:
        checks = {peer: [c._asdict() | {"holds": c.agrees} for c in some] for peer, some in comparisons.items()}
        write_json(out, {"checks": checks, "left_out": missing})
    return comparisons, missing


def main() -> None:
    """Command line of `verify`: a table, and exit code 1 where a figure is off or nothing was compared."""
    from rich.console import Console
    from rich.table import Table

    from eval.cli import run

    comparisons, missing = run(verify)
    table = Table("peer", "figure", "ours", "theirs", "difference", "allowed", "")
    for peer, checks in comparisons.items():
        for c in checks:
            numbers = f"{c.ours:.9g}", f"{c.theirs:.9g}", f"{c.difference:.1e}", f"{c.allowed:.0e}"
            table.add_row(peer, c.name, *numbers, "ok" if c.agrees else "OFF")
    console = Console()
    console.print(table)
    for peer, why in missing.items():
        console.print(f"{peer} was left out: {why}", highlight=False, soft_wrap=True)
    sys.exit(0 if comparisons and all(c.agrees for checks in comparisons.values() for c in checks) else 1)


if __name__ == "__main__":
    main()
