"""Encode prompts and images once, for training without text encoders and autoencoder.

python -m pipelines.cache --pretrained_model_name_or_path FOLDER --prompts prompts.txt --output_dir cache

The cache is written shard by shard. Each shard is complete or absent, so the same command continues after an
interruption. With `accelerate launch` the processes share the shards. Without --prompts the images' captions are the
prompts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro

from distill import ranges
from distill.data import ONLINE, Text, sources
from distill.data.index import fingerprint
from distill.data.online import Images, Texts
from distill.data.shards import Table
from distill.files import folder_lock
from distill.ranges import Count, Natural
from pipelines.cache.writer import (
    SAMPLE,
    Index,
    Precision,
    Writing,
    finish,
    image_entry,
    resume,
    run_command,
    spread,
    start_cache,
    table_entry,
    write_table,
)

if TYPE_CHECKING:
    from pipelines.teacher import Teacher

TEACHER = tyro.conf.arg(name="pretrained_model_name_or_path")


@dataclass(frozen=True)
class Cache:
    """The data to encode, and the folder of the cache."""

    teacher: Annotated[str, TEACHER] = ""  # folder or Hub name of the diffusers pipeline
    # a table (.txt, .csv, .jsonl ...) or a dataset; "": the captions of the images. A run draws
    # max_train_steps x train_batch_size of them, so fewer repeat; DMD2's authors had 3,000,000 (docs/data.md)
    prompts: str = ""
    # a folder, tar shards 'x/{00..12}.tar' or a dataset, with captions. DMD2's authors had 500,000,
    # LCM's 650,000; a subject needs a few (docs/data.md)
    images: str = ""
    output_dir: str = "cache"  # folder of the cache
    prompt_column: str | None = None  # column of the prompts; None: text, caption or prompt
    caption_column: str | None = None  # column of the captions; None: text, caption or prompt
    image_column: str = "image"  # column of the images in a dataset
    crops: Natural = 0  # random crops of each image, with SDXL's size conditions; 0: its centre square
    squeeze: bool = False  # resize the full image to the square, as DMD2 does
    max_samples: Count | None = None  # encode only the first N prompts and images
    skip_incomplete: bool = False  # leave out images without a caption, and rows of metadata without an image
    resolution: Count | None = None  # pixels per side; None: the teacher's training resolution
    revision: str | None = None  # revision of the teacher on the Hub
    variant: str | None = None  # variant of the teacher's weight files, for example fp16
    batch_size: Count = 16  # prompts or images per encoder call
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # precision of the text encoders
    dtype: Precision = "float16"  # precision of the stored tensors
    shard_bytes: Count = 10**9  # approximate size of a file in bytes
    skip_broken: bool = False  # skip unreadable images, and list them

    def __post_init__(self) -> None:
        ranges.validate_ranges(self)
        if self.squeeze and self.crops:
            raise ValueError(f"--squeeze leaves nothing for --crops {self.crops}: leave one of them out")

    @property
    def writing(self) -> Writing:
        return Writing(self.batch_size, self.dtype, self.shard_bytes, self.skip_broken)

    def sources(self) -> Text:
        return Text("online", **{name: getattr(self, name) for name in ONLINE})


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run. Every mistake of the user ends in one message."""
    run_command(Cache, run, __doc__, argv)


def run(config: Cache) -> Path:
    """Create or continue the cache of `config`, and return its folder."""
    with folder_lock(config.output_dir):
        return make_cache(config)


def make_cache(config: Cache) -> Path:
    """Write the cache into its folder, which no other process writes, and return the folder."""
    validate_cache(config)
    from pipelines.launch import silence_libraries, start_accelerator

    state = start_accelerator()
    folder = Path(config.output_dir)
    silence_libraries()
    prompts, pictures = config.sources().sources
    if pictures and not config.skip_broken:
        pictures.validate_headers("replace or remove them, or pass --skip_broken to leave them out")
    teacher = encoders(config, state.device)
    text = Texts(teacher, prompts, pictures.captions if pictures else ())
    tables: dict[str, Table] = {"text": text}
    if pictures:
        tables["image"] = Images(teacher, pictures, text.captions, config.crops, config.squeeze)
    with state.main_process_first():  # it writes the index for the others
        index = open_or_create_index(folder, config, teacher, tables)
    for name, table in tables.items():
        write_table(folder, name, table, index["tables"][name], config.writing, state)
        state.wait_for_everyone()
        teacher.parts.drop_text()
    if state.is_main_process:
        finish(folder, index)
    return folder


def validate_cache(config: Cache) -> None:
    """Check everything that is visible before heavy imports."""
    if Path(config.teacher).is_dir() or not config.teacher:
        from pipelines.components import read_index

        read_index(config.teacher)
    if not (config.prompts or config.images):
        raise ValueError("nothing to encode: pass --prompts prompts.txt, or --images, a folder of images with captions")
    for source in filter(None, (config.prompts, config.images)):
        sources.locate(source)


def encoders(config: Cache, device: torch.device) -> Teacher:
    """The teacher without the weights of its network. The autoencoder works in float32."""
    import importlib

    from pipelines.components import Parts, locate_pipeline
    from pipelines.teacher import teacher_of

    parts = Parts(locate_pipeline(config.teacher, config.revision, config.variant), config.variant)
    parts.precision = getattr(torch, config.precision)
    parts.device = device
    if not any(name.startswith("text_encoder") for name in parts.index):
        raise ValueError(
            f"{parts.folder} is a {parts.index['_class_name']}: it has no text encoder, and needs no cache"
        )
    library, kind = parts.index[parts.network]
    config_of_net = parts.config(parts.network)
    try:
        with torch.device("meta"):
            net = getattr(importlib.import_module(library), kind).from_config(config_of_net)
    except Exception as error:  # classes raise many kinds of errors for a bad config
        raise ValueError(f"{parts.folder}: its {parts.network} ({kind}) cannot be made: {error}") from error
    parts.given[parts.network] = net
    if config.images:
        parts.given["vae"] = parts.component("vae", torch.float32)
    return teacher_of(parts, config.resolution)


def open_or_create_index(folder: Path, config: Cache, teacher: Teacher, tables: dict[str, Table]) -> Index:
    """The index of the cache: the one in the folder if it has the same configuration, or a new one."""
    text = tables["text"]
    images = tables.get("image")
    assert isinstance(text, Texts)
    work = hashlib.blake2b(json.dumps(text.texts).encode(), digest_size=16)
    if isinstance(images, Images):
        work.update(json.dumps([images.pictures.names, images.captions]).encode())
    index: Index = {
        "teacher": fingerprint(teacher.parts.folder),
        "shape": list(teacher.shape),
        "dtype": config.dtype,
        "precision": config.precision,
        "crops": config.crops,
        "prompts": text.prompts,
        "sources": work.hexdigest(),
    }
    if images is not None:
        index["squeeze"] = config.squeeze
    if (old := resume(folder, index)) is not None:
        return old
    index["tables"] = {"text": table_entry(config.writing, len(text), text.read(spread(len(text), SAMPLE)))}
    if images is not None:
        index["tables"]["image"] = image_entry(config.writing, len(images), teacher.shape, config.crops > 0)
    return start_cache(folder, index, text.texts[:-1])
