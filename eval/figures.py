"""The figures of one folder of images under a protocol, or of metrics of your choice: a row.

A row: {model, model_hash, kind, steps, guidance, protocol, protocol_hash, n, seeds, extractor, extractor_hash, images
(their hash), commit, hardware, metrics {name: {value, low, high, n}}, cost, samples (the folder)}. Of a metric that
could not be computed "left_out" {name: reason} says why.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from eval.features.extraction import features, text_features
from eval.features.extractors import Extractor, device, load
from eval.files import images_hash, read_text
from eval.images import images as folders
from eval.images.images import list_images
from eval.inputs import ALONE, choose_protocol, describe_lack, format_reasons, read_swaps, require_reference
from eval.metrics.frechet import Moments
from eval.metrics.lookup import choose_extractor, find_metric
from eval.metrics.registry import METRICS, PIXELS, MetricInputs
from eval.metrics.sets import describe_shortage
from eval.protocol import Measure, Preparation, Protocol
from eval.sampling.cost import git_commit, hardware

if TYPE_CHECKING:
    from eval.features.extraction import Features

Figure = dict[str, Any]  # value, low, high, n and, where its name does not say it, which values are better
ScoredRow = dict[str, Any]  # of one folder: see the module
LARGEST = 1 << 30  # bytes of an array of statistics: 11,585 features
COST = ("parameters", "nfe", "latency", "images_per_second", "peak_memory", "hardware")


@cache
def digits_reference(split: str) -> Tensor:
    """Features [N, 64] of a split of the real digits, after the rounding to 8 bits of generated ones."""
    from distill.data import digits

    images = folders.quantize(digits(split)[0])
    return load("digits").net(images.float())["features"].double()


class Folder:
    """A folder of images: its manifest, files, labels, prompts and features."""

    def __init__(self, path: Path, batch: int = 64, workers: int = 4) -> None:
        self.path = path
        self.batch = batch
        self.workers = workers
        self.teacher: Folder | None = None  # images of its teacher with the same prompts and noise
        self.manifest = folders.read_manifest(path)
        self.files = list_images(path)

    def features(self, net: Extractor, prepare: Preparation) -> Features:
        return features(self.path, net, prepare, batch=self.batch, workers=self.workers)

    @cached_property
    def labels(self) -> Tensor | None:
        labels = self.manifest.get("labels")
        return None if labels is None else torch.tensor(labels)

    @cached_property
    def texts(self) -> list[str] | None:
        """The prompt of every image, from metadata.jsonl. ValueError if an image has none."""
        path = self.path / "metadata.jsonl"
        if not path.is_file():
            return None
        from distill.data.tables import caption

        text_of: dict[str, str] = {}
        try:
            for number, line in enumerate(read_text(path, "prompts are needed").split("\n"), 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                name = row["file_name"]
                text = row["text"]
                if not (isinstance(name, str) and isinstance(text, str)):
                    raise ValueError(f"line {number} has no text")
                if text_of.setdefault(name, caption(text, f"line {number}") or "") != text:
                    raise ValueError(f"line {number} gives {name} a second text")
            names = [file.relative_to(self.path).as_posix() for file in self.files]
            if absent := sorted(text_of.keys() - set(names)):
                folders.warn_once(f"{path} names {len(absent):,} images that are not there: {absent[0]} ...\n")
            return [text_of[name] for name in names]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f'{path} does not hold a line {{"file_name", "text"}} for every image ({error}); prompts are needed'
            ) from None

    @cached_property
    def prompts(self) -> Tensor | None:
        """The number of each image's prompt, or its label if there are no prompts."""
        if self.texts is None:
            return self.labels
        number = {text: i for i, text in enumerate(dict.fromkeys(self.texts))}
        return torch.tensor([number[text] for text in self.texts])

    def picture(self, prepare: Preparation) -> Callable[[int], Tensor]:
        from distill.data import images

        def read(i: int) -> Tensor:
            array = np.array(prepare(images.read(self.files[i]).convert("RGB")))
            return folders.restore(torch.from_numpy(array).permute(2, 0, 1))[None]

        return read

    def has(self, need: str) -> bool:
        """Whether the folder has an input of a metric."""
        if need == "seeds":
            counts = None if self.prompts is None else self.prompts.unique(return_counts=True)[1]
            return counts is not None and int((counts > 1).sum()) > 1  # an interval over prompts needs two
        inputs = {"labels": self.labels, "texts": self.texts, "teacher": self.teacher}
        return need == "reference" or inputs[need] is not None


def read_reference(measure: Measure, p: Protocol, net: Extractor, folder: Path | None) -> Tensor | Moments | Features:
    """The reference of a measure: features of a folder, stored moments, or a split of the digits."""
    path = folder or p.reference_path
    if path is None:
        return digits_reference("heldout" if measure.metric == "fd_heldout" else "train")
    if path.suffix == ".npz":
        return read_statistics(path, p.references)
    return features(path, net, measure.reference or Preparation())


def read_statistics(path: Path, n: int) -> Moments:
    """The moments of n reference images from an .npz file. ValueError if they are invalid."""
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file; name an .npz with the arrays mu and sigma")
    return _read_statistics(path, path.stat().st_mtime_ns, n)


@cache
def _read_statistics(path: Path, _: int, n: int) -> Moments:
    """`read_statistics`, cached by the file's time of change: one eigen-decomposition for all folders."""
    arrays: list[Tensor] = []
    try:
        _check_sizes(path)
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it is one array without a name")
        with stored:
            for key in ("mu", "sigma"):
                array = np.asarray(stored[key])
                if array.dtype.kind not in "iuf":
                    raise ValueError(f"{key} is of kind {array.dtype}, no real numbers")
                arrays.append(torch.from_numpy(array.astype(np.float64)))
    except Exception as error:  # numpy and zipfile raise nearly every kind for broken files
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} does not hold the arrays mu and sigma ({reason}); make it again") from None
    return Moments(n, *arrays).validate(f"{path}")


def _check_sizes(path: Path) -> None:
    """ValueError for an .npz whose arrays unpack to more than statistics have."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            return  # np.load says what it is
        with zipfile.ZipFile(file) as packed:
            for entry in packed.infolist():
                if entry.filename in ("mu.npy", "sigma.npy") and entry.file_size > LARGEST:
                    raise ValueError(f"its {entry.filename} unpacks to {entry.file_size:,} bytes; {LARGEST:,} are read")


def custom_protocol(folder: Folder, metrics: tuple[str, ...], extractor: str | None, other: Path | None) -> Protocol:
    """The protocol of metrics named on the command line, so that their rows have a hash too.

    Images are cropped to their centre square, as in training.
    """
    require_reference(metrics, other)
    measures = []
    for name in metrics:
        entry = find_metric(name)
        prepare = Preparation(entry.patch or "square")
        net = choose_extractor(entry, extractor)
        measures.append(Measure(name, net, prepare, prepare if entry.needs else None))
    files = [] if other is None else list_reference(other)
    size = max(folder.manifest.get("shape", [0]))
    return Protocol("custom", "", len(folder.files), size, tuple(measures), None, None, len(files),
                    source=images_hash(files))  # fmt: skip


def list_reference(path: Path) -> list[Path]:
    """The images of a folder, or a file of stored moments. ValueError if there is neither."""
    if path.suffix != ".npz" or path.is_dir():
        return list_images(path)
    if not path.is_file():
        raise ValueError(f"there is no regular file {path}; name a folder of real images, or an .npz with mu and sigma")
    return [path]


def score_folder(
    folder: str | Path,
    protocol: str | None = None,
    metrics: tuple[str, ...] = (),
    extractor: str | None = None,
    reference_folder: Path | None = None,
    use: tuple[str, ...] = (),
    batch: int = 64,
    workers: int = 4,
    teacher: tuple[Path, ...] = (),
) -> ScoredRow:
    """The row of one folder; see `score_folders`. ValueError for unknown names, and if no metric could be computed.

    Missing inputs of a metric are reported before a network runs. The other metrics are computed. The row's "left_out"
    holds the reasons.
    """
    images = Folder(Path(folder), batch, workers)
    p = _protocol(images, protocol, metrics, extractor, reference_folder)
    if teacher:
        images.teacher = find_teacher(images, teacher)
        p = with_drift(p, images.teacher)
    swap = read_swaps(use)
    specs = {m.metric: swap.get(m.extractor, m.extractor) for m in p.measures}
    left_out: dict[str, str] = {}
    for m in p.measures:
        try:
            _check_needs(images, m, p, specs[m.metric], reference_folder)
        except ValueError as error:
            left_out[m.metric] = str(error)
    nets: dict[str, str] = {}
    scores = _score_measures(images, p, specs, reference_folder, left_out, nets)
    if not scores:
        raise ValueError(f"{folder}: {format_reasons(left_out)}")
    row = _row(images, p, scores, nets)
    return {**row, "left_out": left_out} if left_out else row


def _score_measures(
    images: Folder,
    p: Protocol,
    specs: dict[str, str],
    other: Path | None,
    left_out: dict[str, str],
    nets: dict[str, str],
) -> dict[str, Figure]:
    """The figures of the measures that are not left out. What fails is added to left_out, what was used to nets."""
    scores: dict[str, Figure] = {}
    inputs: dict[tuple[object, ...], MetricInputs | ValueError] = {}
    for m in (m for m in p.measures if m.metric not in left_out):
        spec = specs[m.metric]
        entry = find_metric(m.metric)
        key = (spec, m.generated, m.reference, m.text, "texts" in entry.needs, m.metric if m.metric in ALONE else "")
        try:
            if key not in inputs:
                inputs[key] = _metric_inputs(images, m, p, spec, other, nets)
            scored = entry.compute(_raise_if_failed(inputs[key]))
        except FAILURES as error:
            failure = ValueError(describe_error(error))
            inputs.setdefault(key, failure)  # do not repeat a failed input for another metric
            left_out[m.metric] = str(failure)
        else:
            stated = {} if m.metric in METRICS and entry.better != "neither" else {"better": entry.better}
            named = scored if isinstance(scored, dict) else {m.metric: scored}
            scores |= {name: score._asdict() | stated for name, score in named.items()}
    return scores


FAILURES = (
    ValueError,
    OSError,
    RuntimeError,
    MemoryError,
    SafetensorError,
)  # of one folder; others are scored


def describe_error(error: BaseException) -> str:
    """The message for the user about a failure."""
    from distill.training.checkpoint import describe_disk_error

    if reason := describe_disk_error(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return reason
    if isinstance(error, OSError | SafetensorError):
        return str(error)
    text = str(error) or type(error).__name__
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text.splitlines()[0]}"


def _raise_if_failed(inputs: MetricInputs | ValueError) -> MetricInputs:
    if isinstance(inputs, ValueError):
        raise inputs
    return inputs


def _check_needs(images: Folder, m: Measure, p: Protocol, spec: str, other: Path | None) -> None:
    """ValueError if an input of a metric is missing, before a network runs."""
    entry = find_metric(m.metric)
    if lacks := [need for need in entry.needs if not images.has(need)]:
        raise ValueError(describe_lack(images.path, m.metric, lacks))
    width = None if entry.extractor in ("lpips", PIXELS) else load(spec).width
    least = entry.least or (width or 0) + 1
    if len(images.files) < least:
        raise ValueError(describe_shortage("generated", len(images.files), width or 0, least))
    path = other or p.reference_path
    if "reference" in entry.needs and path is not None:
        _check_reference(m, p, spec, path, width, least)


def _check_reference(m: Measure, p: Protocol, spec: str, path: Path, width: int | None, least: int) -> None:
    """ValueError if a metric cannot use the images or the moments at `path`."""
    if path.suffix != ".npz":
        if (n := len(list_images(path))) < least:
            raise ValueError(describe_shortage("reference", n, width or 0, least))
    elif find_metric(m.metric).least is not None:
        raise ValueError(f"{m.metric} needs a folder of reference images, not their mean and covariance alone")
    elif width not in (None, known := len(read_statistics(path, p.references).mean)):
        raise ValueError(f"{path} is of {known} features, {spec} has {width}; they must come from one extractor")


def _protocol(
    images: Folder, name: str | None, metrics: tuple[str, ...], extractor: str | None, other: Path | None
) -> Protocol:
    """The protocol of `choose_protocol`, else one of the given metrics. n: the number of images in the folder."""
    for name_of_metric in metrics:
        find_metric(name_of_metric)
    if metrics and name is None:
        return custom_protocol(images, metrics, extractor, other)
    p = choose_protocol(images.path, images.manifest, name, metrics)
    p.require(reference=other is None)
    if other is not None and any("reference" in find_metric(m.metric).needs for m in p.measures):
        p = p.with_reference(other, list_reference(other))
    return replace(p, n=len(images.files))


def _metric_inputs(
    images: Folder, m: Measure, p: Protocol, spec: str, other: Path | None, nets: dict[str, str]
) -> MetricInputs:
    entry = find_metric(m.metric)
    inputs = MetricInputs(torch.empty(0), labels=images.labels, prompts=images.prompts, count=len(images.files))
    inputs.picture = images.picture(m.generated)
    if images.teacher is not None:
        inputs.teacher = images.teacher.picture(m.generated)
    if entry.extractor == PIXELS:
        return inputs
    if entry.extractor == "lpips":
        from pipelines.judges import perceptual

        inputs.distance = perceptual.random_distance() if spec == "random" else perceptual.load_lpips()
        nets[spec] = "random" if spec == "random" else "vgg"
        return inputs
    net = load(spec)
    nets[spec] = net.hash
    inputs.fake = images.features(net, m.generated)
    if "reference" in entry.needs:
        inputs.real = read_reference(m, p, net, other)
    if "texts" in entry.needs:
        prefix = f"{m.text} " if m.text else ""
        assert images.texts is not None
        inputs.texts = text_features([prefix + text for text in images.texts], net)
        inputs.scale = net.scale
    return inputs


def find_teacher(images: Folder, candidates: Sequence[Path]) -> Folder:
    """The folder with the prompts or labels, the seed and the number of images of `images`. ValueError without one."""
    for path in candidates:
        folder = Folder(path, images.batch, images.workers)
        same = folder.manifest.get("seed") == images.manifest.get("seed") and len(folder.files) == len(images.files)
        if same and (folder.texts, folder.manifest.get("labels")) == (images.texts, images.manifest.get("labels")):
            return folder
    raise ValueError(
        f"no folder of --teacher has the {len(images.files)} prompts or labels and the seed "
        f"{images.manifest.get('seed')} of {images.path}: generate one with the same flags"
    )


def with_drift(p: Protocol, teacher: Folder) -> Protocol:
    """The protocol with the drift from a teacher's images, whose hash becomes part of its own."""
    others = tuple(m for m in p.measures if m.metric != "drift")
    content = teacher.manifest.get("hash") or images_hash(teacher.files)
    return replace(p, measures=(*others, Measure("drift", f"{PIXELS}:{content}")))


def _row(images: Folder, p: Protocol, scores: dict[str, Figure], nets: dict[str, str]) -> ScoredRow:
    manifest = images.manifest
    cost = manifest.get("cost") or {}
    model = manifest.get("name") or manifest.get("model")
    seeds = [] if manifest.get("seed") is None else [manifest["seed"]]
    return {
        "model": images.path.name if model in (None, "", "pipeline") else model,
        "model_hash": manifest.get("model_hash"),
        "kind": manifest.get("kind"),
        **{key: manifest.get(key) for key in ("steps", "guidance", "scheduler")},
        "protocol": p.name,
        "protocol_hash": p.hash,
        "n": len(images.files),
        "seeds": seeds,
        "extractor": ", ".join(nets),
        "extractor_hash": ", ".join(nets.values()),
        "images": manifest.get("hash"),
        "commit": git_commit(),
        "hardware": hardware(device()),
        "metrics": scores,
        "cost": {key: cost.get(key, manifest.get(key)) for key in COST},
        "samples": str(images.path),
    }
