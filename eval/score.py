"""Folders of images -> one row of figures each, under a protocol or with metrics of your choice.

python -m eval.score --folder runs/images/dmd2 runs/images/teacher --protocol digits --out runs/scores.json
python -m eval.score --folder runs/images/a --reference photos --metrics fid kid --extractor dinov2

A row: {model, kind, steps, guidance, protocol, protocol_hash, n, seeds, extractor, extractor_hash, images (their hash),
commit, hardware, metrics {name: {value, low, high, n}}, cost, samples (the folder)}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eval import images as folders
from eval.cli import Unfinished
from eval.cost import commit, hardware
from eval.extractors import Extractor, device, load
from eval.features import features, listing, text_features
from eval.metrics import Given, Moments, Score, metric
from eval.protocols import Measure, Prepare, Protocol
from eval.protocols import protocol as named

if TYPE_CHECKING:
    from eval.features import Features

ALONE = ("fd_heldout", "fd_train", "lpips_diversity")  # they share no input with other metrics
COST = ("parameters", "nfe", "latency", "images_per_second", "peak_memory", "hardware")


@cache
def digits_reference(split: str) -> Tensor:
    """Features [N, 64] of a split of the real digits, after the rounding to 8 bits of generated ones."""
    from distill.data import digits

    images = folders.quantize(digits(split)[0])
    return load("digits").net(images.float())["features"].double()


class Folder:
    """A folder of images as the metrics ask for it."""

    def __init__(self, path: Path, batch: int = 64, workers: int = 4) -> None:
        self.path, self.batch, self.workers = path, batch, workers
        self.manifest, self.files = folders.manifest_of(path), listing(path)

    def features(self, net: Extractor, prepare: Prepare) -> Features:
        return features(self.path, net, prepare, batch=self.batch, workers=self.workers)

    @cached_property
    def labels(self) -> Tensor | None:
        found = self.manifest.get("labels")
        return None if found is None else torch.tensor(found)

    @cached_property
    def texts(self) -> list[str] | None:
        """The prompt of every image, of metadata.jsonl; ValueError where one has none."""
        path = self.path / "metadata.jsonl"
        if not path.is_file():
            return None
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
            found = {line["file_name"]: line["text"] for line in lines}
            return [found[f"{file.relative_to(self.path)}"] for file in self.files]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'{path} does not hold a line {{"file_name", "text"}} for every image ({error}); prompts are needed'
            ) from None

    @cached_property
    def prompts(self) -> Tensor | None:
        """The number of each image's prompt: of its text, else of its label."""
        if self.texts is None:
            return self.labels
        number = {text: i for i, text in enumerate(dict.fromkeys(self.texts))}
        return torch.tensor([number[text] for text in self.texts])

    def picture(self, prepare: Prepare) -> Callable[[int], Tensor]:
        from distill.data import images

        def read(i: int) -> Tensor:
            array = np.array(prepare(images.read(self.files[i]).convert("RGB")))
            return folders.restore(torch.from_numpy(array).permute(2, 0, 1))[None]

        return read

    def has(self, need: str) -> bool:
        """Whether the folder holds what a metric needs of it."""
        if need == "seeds":
            return self.prompts is not None and len(self.prompts.unique()) < len(self.prompts)
        return need == "reference" or {"labels": self.labels, "texts": self.texts}[need] is not None


def reference(measure: Measure, p: Protocol, net: Extractor, folder: Path | None) -> Any:
    """What a measure compares with: features of a folder, stored moments, or a split of the digits."""
    path = folder or p.reference_path
    if path is None:
        return digits_reference("heldout" if measure.metric == "fd_heldout" else "train")
    if path.suffix == ".npz":
        try:
            with np.load(path) as stored:
                mean, cov = (torch.from_numpy(stored[key]).double() for key in ("mu", "sigma"))
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} does not hold the arrays mu and sigma ({error})") from None
        return Moments(p.references, mean, cov)
    return features(path, net, measure.reference or Prepare())


def custom(folder: Folder, metrics: tuple[str, ...], extractor: str | None, other: Path | None) -> Protocol:
    """The protocol of metrics that were named on the command line, so that these rows carry a hash as well."""
    from eval.features import images_hash

    measures = []
    for name in metrics:
        entry = metric(name)
        prepare = Prepare(entry.patch)
        measures.append(Measure(name, extractor or entry.extractor, prepare, prepare if entry.needs else None))
        if "reference" in entry.needs and other is None and name not in ALONE:
            raise ValueError(f"metric {name} compares with real images: name their folder by --reference")
    files = [] if other is None else _reference_files(other)
    size = max(folder.manifest.get("shape", [0]))
    return Protocol("custom", "", len(folder.files), size, tuple(measures), None, None, len(files),
                    source=images_hash(files))  # fmt: skip


def _reference_files(path: Path) -> list[Path]:
    """The images of a folder, or a file of stored moments. ValueError where there is neither."""
    return [path] if path.suffix == ".npz" and path.is_file() else listing(path)


def score(
    folder: str | Path,
    protocol: str | None = None,
    metrics: tuple[str, ...] = (),
    extractor: str | None = None,
    reference_folder: Path | None = None,
    use: tuple[str, ...] = (),
    batch: int = 64,
    workers: int = 4,
) -> dict[str, Any]:
    """The row of one folder; see `scores`. What is unknown, absent or too little is a ValueError, before long work."""
    found = Folder(Path(folder), batch, workers)
    p = _protocol(found, protocol, metrics, extractor, reference_folder)
    swap = dict(_pair(text) for text in use)
    for m in p.measures:
        entry = metric(m.metric)
        lacks = [need for need in entry.needs if not found.has(need)]
        if lacks:
            raise ValueError(f"{folder} has no {' and '.join(map(_NEEDS.get, lacks))}, which {m.metric} needs")
    made: dict[str, Score] = {}
    given: dict[Any, Given] = {}
    nets: dict[str, str] = {}
    try:
        for m in p.measures:
            spec = swap.get(m.extractor, m.extractor)
            key = (spec, m.generated, m.reference, m.text, m.metric if m.metric in ALONE else "")
            if key not in given:
                given[key] = _given(found, m, p, spec, reference_folder, nets)
            scored = metric(m.metric).compute(given[key])
            made |= scored if isinstance(scored, dict) else {m.metric: scored}
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return _row(found, p, made, nets)


_NEEDS = {"labels": "labels", "texts": "prompts (metadata.jsonl)", "seeds": "two images of a prompt"}


def _pair(text: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise ValueError(
            f"--use {text}: write EXTRACTOR=EXTRACTOR, such as inception-clean=inception-clean:some/file.pt"
        )
    return left, right


def _protocol(
    found: Folder, name: str | None, metrics: tuple[str, ...], extractor: str | None, other: Path | None
) -> Protocol:
    """The named protocol, that of the manifest, or one of the metrics that were asked for; n as it is here."""
    for wanted in metrics:
        metric(wanted)
    if metrics and name is None:
        return custom(found, metrics, extractor, other)
    p = named(name or found.manifest.get("protocol") or "digits")
    p.require(reference=other is None)
    if metrics:
        p = replace(p, measures=tuple(m for m in p.measures if m.metric in metrics))
        if not p.measures:
            raise ValueError(f"protocol {p.name} measures none of {', '.join(metrics)}; leave --protocol out to choose")
    return replace(p, n=len(found.files))


def _given(found: Folder, m: Measure, p: Protocol, spec: str, other: Path | None, nets: dict[str, str]) -> Given:
    entry = metric(m.metric)
    given = Given(torch.empty(0), labels=found.labels, prompts=found.prompts)
    if entry.extractor == "lpips":
        from pipelines import perceptual

        given.picture = found.picture(m.generated)
        given.distance = perceptual.random() if spec == "random" else perceptual.lpips()
        nets[spec] = "random" if spec == "random" else "vgg"
        return given
    net = load(spec)
    nets[spec] = net.hash
    given.fake = found.features(net, m.generated)
    if "reference" in entry.needs:
        given.real = reference(m, p, net, other)
    if "texts" in entry.needs:
        prefix = f"{m.text} " if m.text else ""
        assert found.texts is not None
        given.texts, given.scale = text_features([prefix + text for text in found.texts], net), net.scale
    return given


def _row(found: Folder, p: Protocol, made: dict[str, Score], nets: dict[str, str]) -> dict[str, Any]:
    manifest = found.manifest
    cost = manifest.get("cost") or {}
    return {
        "model": manifest.get("name") or manifest.get("model") or found.path.name,
        "kind": manifest.get("kind"),
        **{key: manifest.get(key) for key in ("steps", "guidance", "scheduler")},
        "protocol": p.name,
        "protocol_hash": p.hash,
        "n": len(found.files),
        "seeds": [] if manifest.get("seed") is None else [manifest["seed"]],
        "extractor": ", ".join(nets),
        "extractor_hash": ", ".join(nets.values()),
        "images": manifest.get("hash"),
        "commit": commit(),
        "hardware": hardware(device()),
        "metrics": {name: s._asdict() for name, s in made.items()},
        "cost": {key: cost.get(key, manifest.get(key)) for key in COST},
        "samples": str(found.path),
    }


def main_process() -> bool:
    """Whether this process, of those of one launch, writes."""
    return int(os.environ.get("RANK", 0)) == 0


def scores(
    folder: tuple[Path, ...],
    out: Path | None = None,
    protocol: str | None = None,
    metrics: tuple[str, ...] = (),
    extractor: str | None = None,
    reference: Path | None = None,
    use: tuple[str, ...] = (),
    batch: int = 64,
    workers: int = 4,
) -> list[dict[str, Any]]:
    """Score folders of images. A folder that fails does not stop the others; the end names it, with exit code 1.

    Args:
        folder: one or more folders of images.
        out: where the rows go, as JSON.
        protocol: its name (python -m eval.protocols); by default the one that a folder was made for, else digits.
        metrics: only these of the protocol; without a protocol, any of eval/metrics.py.
        extractor: without a protocol: the extractor of all metrics, by default each one's own.
        reference: a folder of real images, or an .npz with mu and sigma, instead of the protocol's.
        use: EXTRACTOR=EXTRACTOR, for example to name local weights; rows carry the hash of what was used.
        batch: images per call of an extractor.
        workers: threads that read and resize.
    """
    from tqdm import tqdm

    if not folder:
        raise ValueError("no folder was given; name at least one after --folder")
    if reference is not None:
        _reference_files(reference)
    found, failed = [], []
    for path in tqdm(folder, unit="folder", desc="score", leave=False, disable=len(folder) < 2):
        try:
            found.append(score(path, protocol, metrics, extractor, reference, use, batch, workers))
        except ValueError as error:
            failed.append(str(error))
    if out is not None and found and main_process():
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    if failed:
        made = f" ({len(found)} of {len(folder)} folders were scored)" if len(folder) > 1 else ""
        raise (Unfinished if found else ValueError)("; ".join(failed) + made)
    return found


def main() -> None:
    """Command line of `scores`."""
    from rich.console import Console

    from eval.cli import run
    from eval.report import table

    for one in table(run(scores)):
        if main_process():
            Console().print(one)


if __name__ == "__main__":
    main()
