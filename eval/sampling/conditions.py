"""The prompt or the label of each image of a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.data.labels import CLASS_NAMES
from eval.files import read_json
from eval.images.manifest import is_count
from eval.protocol import Protocol

WITHOUT_CONDITION = ("DDIMPipeline", "DDPMPipeline")
PIXELS = ("ConsistencyModelPipeline", *WITHOUT_CONDITION)  # pipelines of images themselves, without an autoencoder
LABELS = (*PIXELS, "DiTPipeline")  # pipelines that take labels, or nothing
IMAGES = 1_000_000  # of a folder at most: their names have six digits
DIGITS = 10  # classes of the digits


class SampleConditions(NamedTuple):
    """The prompts or labels of n images."""

    values: Sequence[str | int]
    prompts: bool

    @property
    def hash(self) -> str:
        """16 hex digits of BLAKE2b."""
        return hashlib.blake2b(json.dumps(self.values).encode(), digest_size=8).hexdigest()


def read_prompts(source: str, column: str | None = None) -> list[str]:
    """The prompts of a source of distill.data.sources, or of a folder of .txt files with one prompt each, sorted."""
    from distill.data.sources import prompts
    from distill.data.tables import caption
    from distill.files import read_text

    files = sorted(Path(source).glob("*.txt")) if Path(source).is_dir() else []
    if not files:
        return prompts(source, column)
    texts = [caption(" ".join(read_text(file).split()), f"{file}") or "" for file in files]
    if empty := [file for file, text in zip(files, texts, strict=True) if not text]:
        raise ValueError(f"{empty[0]} is empty; it needs a prompt")
    return texts


def protocol_conditions(model: Path, protocol: Protocol, n: int | None) -> SampleConditions:
    """The conditions of a protocol, or of its first n images. ValueError if the pipeline takes others."""
    if (protocol.classes is None) == takes_labels(model):
        kind = "prompts" if protocol.classes is None else "labels"
        raise ValueError(f"protocol {protocol.name} gives {kind}, which {model} does not take; choose another")
    return SampleConditions(protocol.conditions(n), protocol.classes is None)


def prompt_conditions(model: Path, source: str, column: str | None, n: int | None, each: int) -> SampleConditions:
    """The conditions of `each` images of every prompt, or of the first n. ValueError if there are fewer."""
    if takes_labels(model):
        raise ValueError(f"{model} takes labels, not prompts; leave out --prompts, and say --classes")
    texts = read_prompts(source, column)
    if n is not None and len(texts) * each < n:
        times = f" x {each} images" if each > 1 else ""
        raise ValueError(
            f"{source} holds {len(texts)} prompts{times}, fewer than the {n} images asked for: lower --n, or raise "
            "--per_prompt"
        )
    n = n or len(texts) * each
    if n > IMAGES:
        raise ValueError(
            f"{source} asks for {n:,} images; a folder holds {IMAGES:,} at most: lower --n or --per_prompt"
        )
    return SampleConditions([texts[i // each] for i in range(n)], True)


def label_conditions(model: Path, classes: int | None, n: int) -> SampleConditions:
    """The labels i % classes. ValueError for a pipeline that takes prompts."""
    from pipelines.components import read_index

    if not takes_labels(model):
        raise ValueError(f"{model} takes prompts: pass --prompts FILE (.txt, one a line, .jsonl or .parquet)")
    known = _count_embeddings(model)
    if classes is not None and read_index(model)["_class_name"] in WITHOUT_CONDITION:
        raise ValueError(f"classes is {classes}, and {model} takes no labels: leave out --classes")
    if classes is not None and known is not None and classes > known:
        raise ValueError(f"classes is {classes}, and the network of {model} knows {known} labels: lower --classes")
    classes = classes or _count_classes(model)
    return SampleConditions([i % classes for i in range(n)], False)


def takes_labels(model: Path) -> bool:
    from pipelines.components import read_index

    return read_index(model)["_class_name"] in LABELS


def _count_classes(model: Path) -> int:
    """The number of a network's classes, without the null class."""
    embedded = _count_embeddings(model)
    facts = _json(model / "distill.json")
    null = facts.get("null_class")
    if embedded is None:
        return 1
    if isinstance(names := facts.get(CLASS_NAMES), list) and 0 < len(names) <= embedded:
        return len(names)
    if null is not None and type(null) is not int:
        raise ValueError(f"{model / 'distill.json'}: null_class is {null!r}, which is not a number; correct it")
    if null is not None:
        return null if null == embedded - 1 else embedded
    if embedded in (DIGITS, DIGITS + 1):
        return DIGITS
    raise ValueError(
        f"the network of {model} knows {embedded} labels; say how many are classes, --classes {embedded} or, if one "
        f"stands for none, {embedded - 1}"
    )


def _count_embeddings(model: Path) -> int | None:
    """The number of a network's labels, with the null class; None without labels."""
    config = _json(model / "unet" / "config.json") or _json(model / "transformer" / "config.json")
    count = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    if count is not None and not is_count(count):
        raise ValueError(f"the config of the network of {model} has {count!r} labels, which is no number; correct it")
    return count


def _json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} if the file is absent."""
    tree = read_json(path, "export or download the model again") if path.exists() else {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is not a JSON object; export or download the model again")
    return tree
