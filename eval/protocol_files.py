"""A protocol of one's own, in a YAML file.

name: faces                    # in tables; by default the file's name
size: 64                       # pixels of a side of a generated image
labels: 4                      # image i has label i % 4; or prompts: a file, or a list of texts
n: 2000                        # images of a seed; by default per_prompt images of each prompt, of labels 2000
seeds: [0, 1, 2]               # of the noise; by default 0
reference: photos              # folder of real images, or an .npz with mu and sigma
extractor: dinov2              # of all metrics; by default each one's own
resize: {crop: square, size: 64, filter: lanczos}      # of generated and real images; the default; null: none
metrics: [kid, {metric: fid, extractor: inception-clean}, own.py]      # the first is the headline
prompt_column: text            # of the prompts' table
per_prompt: 1                  # images of each prompt
notes: ...                     # no part of the hash

Paths are relative to the file. The hash is of everything but the notes, with the contents of prompts and real images
instead of their paths.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

from distill.files import read_yaml
from eval.features.weights import EXTRACTOR_NAMES
from eval.files import images_hash, list_names, shorten
from eval.metrics.lookup import choose_extractor, column_name, find_metric
from eval.metrics.lookup import is_file_name as is_metric_file
from eval.protocol import Measure, Preparation, Protocol, hash_fields, is_present

SUFFIXES = (".yaml", ".yml")
IMAGES = 1_000_000  # of a folder at most
FILTERS = ("lanczos", "bicubic", "bilinear", "box")
WIDTHS = {"inception-clean": 2048, "inception-legacy": 2048, "digits": 64}  # features, where they are always as many
Tree = Mapping[str, Any]  # of a YAML file


def is_file_name(name: str) -> bool:
    """Whether a protocol's name is that of a file."""
    return name.lower().endswith(SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class FileProtocol(Protocol):
    """A protocol of a file. `prompts` is the hash of the prompts."""

    file: Path
    texts: tuple[str, ...] = ()  # prompts that the file holds itself
    prompt_path: Path | None = None  # the file of the prompts
    prompt_column: str | None = None
    images_per_prompt: int = 1
    real: Path | None = None  # folder or .npz of the reference

    @property
    def hash(self) -> str:
        fields = asdict(self) | {"measures": [m.hash_fields for m in self.measures]}
        for key in ("notes", "file", "texts", "prompt_path", "real"):
            del fields[key]
        real = self.real
        return hash_fields(fields | {"source": "" if real is None or not is_present(real) else _hash_reference(real)})

    @property
    def sampling_hash(self) -> str:
        return hash_fields(
            {"size": self.size, "classes": self.classes, "prompts": self.prompts, "each": self.images_per_prompt}
        )

    @property
    def address(self) -> str:
        return f"{self.file}"

    @property
    def per_prompt(self) -> int:
        return self.images_per_prompt

    @property
    def folder(self) -> Path:
        return self.file.parent

    @property
    def prompt_file(self) -> Path | None:
        return self.prompt_path

    @property
    def reference_path(self) -> Path | None:
        return self.real

    def with_reference(self, path: Path, files: Sequence[Path]) -> Self:
        return replace(self, real=path, references=len(files))

    def missing(self, reference: bool = True) -> str | None:
        compared = [m.metric for m in self.measures if "reference" in find_metric(m.metric).needs]
        if not reference or not compared:
            return None
        if self.real is None:
            return f"protocol {self.file} has no reference, which {compared[0]} needs: name a folder by --reference"
        if not is_present(self.real):
            kind = "file" if self.real.suffix else "image below"
            return f"the reference of protocol {self.file}: there is no {kind} {self.real}; put it there"
        return None

    def prompt_texts(self, limit: int | None = None) -> list[str]:
        """The different prompts in their order, each once for all of its images."""
        if self.prompt_path is None:
            return list(self.texts[:limit])
        from distill.data.sources import prompts

        return prompts(f"{self.prompt_path}", self.prompt_column, limit)

    def conditions(self, n: int | None = None) -> list[str] | list[int]:
        if self.classes is not None:
            return super().conditions(n)
        n = n or self.n
        texts = self.prompt_texts()
        each = self.images_per_prompt
        n = n or len(texts) * each
        if len(texts) * each < n:
            raise ValueError(
                f"protocol {self.file} has {len(texts)} prompts for {each} image(s) each; {n} images need more: "
                "lower n, or raise per_prompt"
            )
        return [texts[i // each] for i in range(n)]


def _hash_reference(path: Path) -> str:
    """The hash of the contents of a folder of images, or of a file."""
    if path.is_file():
        files = [path]
    else:
        from distill.data import images

        files = [file for file in images.files(path) if images.is_image(file)]
    return _hash_files(tuple((file, (status := file.stat()).st_size, status.st_mtime_ns) for file in files))


@cache
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """The hash of files, computed once while their sizes and times stay."""
    return images_hash(file for file, _, _ in files)


def read_protocol(path: Path) -> FileProtocol:
    """The protocol of a YAML file. ValueError that names every wrong key and value."""
    if not path.is_file():
        raise ValueError(f"there is no protocol file {path} in {Path.cwd()}; docs/evaluation.md shows one")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold names with values: size, metrics ...; docs/evaluation.md shows a file")
    reader = _Reader(path, tree)
    protocol = reader.read()
    if reader.problems:
        raise ValueError(f"protocol {path}: " + "; ".join(dict.fromkeys(reader.problems)))
    return protocol


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= IMAGES


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


KEYS: dict[str, tuple[Callable[[object], bool], str]] = {  # of a file: check, kind
    **dict.fromkeys(("n", "labels", "per_prompt"), (_is_count, f"a whole number from 1 to {IMAGES:,}")),
    "size": (lambda value: value in range(1, 1 << 14) and type(value) is int, "a number of pixels from 1 to 16,383"),
    **dict.fromkeys(("name", "reference", "extractor", "prompt_column", "notes"), (_is_text, "text")),
    "prompts": (lambda value: _is_text(value) or _are_texts(value), "a file, or a list of texts"),
    "seeds": (lambda value: bool(_seeds(value)), "different whole numbers from 0"),
    "resize": (lambda value: value is None or isinstance(value, dict), "names with values: crop, size, filter"),
    "metrics": (lambda value: bool(value) and isinstance(value, list | str), "a list of metrics"),
}
RESIZE: dict[str, tuple[Callable[[object], bool], str]] = {
    "crop": (lambda value: value in (None, "square") or _is_count(value), "square, null or a number of pixels"),
    "size": (lambda value: value is None or KEYS["size"][0](value), "null or a number of pixels"),
    "filter": (lambda value: value in FILTERS, f"one of {', '.join(FILTERS)}"),
}
METRIC: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(("metric", "extractor"), (_is_text, "text")),
    "resize": KEYS["resize"],
    "text": (lambda value: isinstance(value, str), "text"),
}


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _seeds(value: object) -> tuple[int, ...]:
    """A seed or a list of different seeds; () for other values."""
    listed = value if isinstance(value, list) else [value]
    seeds = tuple(seed for seed in listed if type(seed) is int and 0 <= seed < 1 << 63)
    return seeds if len(set(seeds)) == len(listed) else ()


class _Reader:
    """Reads the tree of a file and collects its problems."""

    def __init__(self, path: Path, tree: Tree) -> None:
        self.path = path
        self.problems: list[str] = []
        self.tree = self._valid(tree, KEYS, "")
        for key in ("size", "metrics"):
            if key not in tree:
                self.problems.append(f"{key} is missing; it must be {KEYS[key][1]}")

    def read(self) -> FileProtocol:
        """The protocol; it must not be used if there are problems."""
        get = self.tree.get
        texts, prompt_path = self._prompts()
        measures = self._measures()
        each = get("per_prompt", 1)
        self._check_conditions(measures)
        reference = None if "reference" not in self.tree else self._resolve_path(str(get("reference")))
        n = get("n", len(texts) * each or (2000 if "labels" in self.tree else 0))
        for measure in measures:
            width = WIDTHS.get(measure.extractor, 0)
            if find_metric(measure.metric).least is None and 0 < n <= width:
                self.problems.append(
                    f"n is {n}; {measure.metric} of {measure.extractor} needs {width + 1:,} images, kid needs two"
                )
        return FileProtocol(
            name=get("name", self.path.stem),
            data="",
            n=n,
            size=get("size", 0),
            measures=measures,
            classes=get("labels"),
            seeds=_seeds(get("seeds", 0)),
            prompts=self._hash_prompts(texts, prompt_path),
            notes=get("notes", ""),
            file=self.path,
            texts=texts,
            prompt_path=prompt_path,
            prompt_column=get("prompt_column"),
            images_per_prompt=each,
            real=reference,
        )

    def _valid(self, tree: Tree, keys: Mapping[str, tuple[Callable[[object], bool], str]], where: str) -> Tree:
        """The valid part of a mapping."""
        valid = {}
        for key, value in tree.items():
            if key not in keys:
                self.problems.append(f"{where}{key!r} is no key; {list_names(str(key), keys)}")
            elif not keys[key][0](value):
                self.problems.append(f"{where}{key} is {shorten(value)}; it must be {keys[key][1]}")
            else:
                valid[key] = value
        return valid

    def _resolve_path(self, name: str) -> Path:
        """A path that is relative to the file."""
        return self.path.parent / name

    def _prompts(self) -> tuple[tuple[str, ...], Path | None]:
        """(texts of the file, path of the prompts' file)."""
        given = self.tree.get("prompts")
        if isinstance(given, list):
            return tuple(given), None
        if given is None:
            return (), None
        path = self._resolve_path(given)
        if not path.is_file():
            self.problems.append(f"prompts is {given}, but there is no file {path}")
        return (), path

    def _hash_prompts(self, texts: tuple[str, ...], path: Path | None) -> str:
        """The hash of the texts, or of the contents of the file and the column."""
        if path is not None and path.is_file():
            column = f"{self.tree.get('prompt_column')}".encode()
            return hashlib.blake2b(images_hash([path]).encode() + column, digest_size=8).hexdigest()
        return hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).hexdigest() if texts else ""

    def _check_conditions(self, measures: Sequence[Measure]) -> None:
        """Note labels and prompts that exclude each other, and metrics that need the others."""
        given = [key for key in ("labels", "prompts") if key in self.tree]
        if len(given) != 1:
            self.problems.append(f"{' and '.join(given) or 'neither labels nor prompts'}: give one of labels, prompts")
            return
        for key in ("per_prompt", "prompt_column"):
            if given == ["labels"] and key in self.tree:
                self.problems.append(f"{key} is given, but there are no prompts: leave it out")
        lacking = {"labels": "texts", "prompts": "labels"}[given[0]]
        for measure in measures:
            if lacking in find_metric(measure.metric).needs:
                kind = {"texts": "prompts", "labels": "labels"}[lacking]
                self.problems.append(f"metric {measure.metric} needs {kind}, and the protocol gives {given[0]}")

    def _measures(self) -> tuple[Measure, ...]:
        listed = self.tree.get("metrics", [])
        measures = [self._measure(one) for one in (listed if isinstance(listed, list) else [listed])]
        names = [column_name(measure.metric) for measure in measures if measure is not None]
        if repeated := [name for name in names if names.count(name) > 1]:
            self.problems.append(f"metric {repeated[0]} is listed twice")
        return tuple(measure for measure in measures if measure is not None)

    def _measure(self, given: object) -> Measure | None:
        """A metric by its name, or with values of its own; None if it is not valid."""
        values: Tree = self._valid(given, METRIC, "metrics: ") if isinstance(given, dict) else {"metric": given}
        name = values.get("metric")
        if isinstance(name, str) and is_metric_file(name):
            name = f"{self._resolve_path(name)}"
        try:
            entry = find_metric(str(name))
        except ValueError as error:
            self.problems.append(str(error))
            return None
        extractor = values.get("extractor") or self.tree.get("extractor") or entry.extractor
        extractor = choose_extractor(entry, extractor)
        kind = extractor.partition(":")[0]
        if kind not in EXTRACTOR_NAMES and extractor != entry.extractor:
            self.problems.append(f"extractor {kind!r} is unknown; {list_names(kind, EXTRACTOR_NAMES)}")
        prepare = self._preparation(values, entry.patch)
        return Measure(
            str(name), extractor, prepare, prepare if "reference" in entry.needs else None, values.get("text", "")
        )

    def _preparation(self, values: Tree, patch: int | None) -> Preparation:
        """The rule of a metric: its own, else its patch, else that of the file."""
        source = values if "resize" in values else self.tree
        if patch is not None and source is self.tree:
            return Preparation(patch)
        rule = source.get("resize", {})
        if rule is None:
            return Preparation()
        return Preparation(**{"crop": "square", "size": self.tree.get("size"), **self._valid(rule, RESIZE, "resize: ")})
