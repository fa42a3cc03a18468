"""Sample pairs of the teacher's ODE: python -m pipelines.pairs --pretrained_model_name_or_path FOLDER --prompts FILE

Noise, and the teacher's sample from it under a prompt, for recipes/ode_sdxl.py. The result is a cache whose images are
the teacher's own samples, so that a method that needs images can be trained on it, too. It is written shard by shard
like other caches: the same command continues after an interruption, and `accelerate launch` shares the shards among
processes. Noise is a function of (seed, row), and is not stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro

from distill import ranges
from distill.data import Text
from distill.data.index import digest, fingerprint
from distill.data.index import texts as stored_texts
from distill.data.online import Texts
from distill.data.pairs import Trajectories
from distill.data.shards import Rows, Shards, Table
from distill.files import folder_lock
from distill.ranges import Calls, Count, Finite, Seed
from pipelines.cache.encodings import TEACHER
from pipelines.cache.writer import (
    SAMPLE,
    Index,
    Precision,
    Writing,
    finish,
    image_entry,
    resume,
    run_command,
    split_rows,
    spread,
    start_cache,
    table_entry,
    write_table,
)

if TYPE_CHECKING:
    from pipelines.teacher import Teacher

SHARD = 64  # pairs per file; an interrupted command repeats at most this number
CACHE = tyro.conf.arg(aliases=["--data.cache"])


@dataclass(frozen=True)
class Sampling:
    """The pairs to sample, and the folder for them."""

    teacher: Annotated[str, TEACHER] = ""  # folder or Hub name of the diffusers pipeline
    cache: Annotated[str, CACHE] = ""  # cache of prompts from `python -m pipelines.cache`
    prompts: str = ""  # or prompts to encode now: a table (.txt, .csv, .jsonl ...) or a dataset
    prompt_column: str | None = None  # column of the prompts; None: text, caption or prompt
    output_dir: str = "pairs"
    n: Count = 10_000  # number of pairs (DMD2); prompts are repeated if there are fewer
    steps: Calls = 50  # number of steps of the teacher
    guidance: Finite = 8.0  # guidance scale of the teacher (DMD2)
    scheduler: Literal["own", "euler"] = "own"  # the pipeline's own, or Euler's steps that end at trailing times (DMD2)
    seed: Seed = 0  # seed of the noise
    resolution: Count | None = None  # pixels per side; None: the teacher's training resolution
    revision: str | None = None  # revision of the teacher on the Hub
    variant: str | None = None  # variant of the teacher's weight files, for example fp16
    batch_size: Count = 8  # number of pairs per batch
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # precision of the teacher; the ODE is float32
    dtype: Precision = "float16"  # precision of the stored tensors

    def __post_init__(self) -> None:
        ranges.validate_ranges(self)
        if self.cache and self.prompts:
            raise ValueError("a cache has its own prompts: leave out --prompts or --cache")

    @property
    def writing(self) -> Writing:
        return Writing(self.batch_size, self.dtype)

    def text(self) -> Text:
        if not self.prompts:
            return Text(cache=self.cache)
        return Text("online", prompts=self.prompts, prompt_column=self.prompt_column)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run. Every mistake of the user ends in one message."""
    run_command(Sampling, run, __doc__, argv)


def run(config: Sampling) -> Path:
    """Create or continue the pairs of `config`, and return their folder."""
    with folder_lock(config.output_dir):
        return make_pairs(config)


def make_pairs(config: Sampling) -> Path:
    """Write the pairs into their folder, which no other process writes, and return the folder."""
    validate_sampling(config)
    from pipelines.launch import silence_libraries, start_accelerator

    state = start_accelerator()
    folder = Path(config.output_dir)
    silence_libraries()
    teacher = load_pairs_teacher(config, state.device)
    texts, text = prompts(config, teacher)
    with state.main_process_first():  # it writes the index for the others
        index = open_or_create_index(folder, config, teacher, texts, text)
    write_table(folder, "text", text, index["tables"]["text"], config.writing, state)
    state.wait_for_everyone()
    teacher.parts.drop_text()
    entry = index["tables"]["text"]
    sizes = [len(rows) for rows in split_rows(range(entry["total"]), entry["per_shard"])]
    stored = Shards(folder, "text", {**entry, "rows": sizes})
    deterministic(Trajectories(teacher, stored, len(texts), 1, 2, config.guidance, config.seed))
    pairs = Trajectories(teacher, stored, len(texts), config.n, config.steps, config.guidance, config.seed)
    write_table(folder, "image", pairs, index["tables"]["image"], config.writing, state)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(folder, index)
    return folder


def validate_sampling(config: Sampling) -> None:
    """Check everything that is visible before heavy imports."""
    if Path(config.teacher).is_dir() or not config.teacher:
        from pipelines.components import read_index

        read_index(config.teacher)
    if not (config.cache or config.prompts):
        raise ValueError(
            "no prompts: pass --cache, a folder that python -m pipelines.cache has made, or --prompts FILE"
        )
    config.text().validate(())


def load_pairs_teacher(config: Sampling, device: torch.device) -> Teacher:
    """The teacher on its device, with the scheduler of the configuration."""
    from pipelines import load
    from pipelines.components import locate_pipeline

    precision = getattr(torch, config.precision)
    folder = locate_pipeline(config.teacher, config.revision, config.variant)
    teacher = load(folder, config.resolution, None, config.variant, precision)
    teacher.parts.device = device
    teacher.denoiser.net.to(device, precision)
    if config.scheduler == "euler":
        from diffusers import EulerDiscreteScheduler

        from distill.diffusion.schedule import VP

        if not isinstance(teacher.denoiser.schedule, VP):
            name = type(teacher.parts.scheduler()).__name__
            raise ValueError(f"--scheduler euler is for tables of betas; this teacher has a {name}: leave it out")
        given = EulerDiscreteScheduler.from_config(teacher.parts.scheduler().config, timestep_spacing="trailing")
        teacher.parts.given["scheduler"] = given
    return teacher


class PairTexts:
    """The first n rows of a table of texts, and its last row, the empty text."""

    def __init__(self, text: Table, n: int) -> None:
        self.text = text
        self.n = n

    def __len__(self) -> int:
        return self.n + 1

    def read(self, rows: Sequence[int]) -> Rows:
        return self.text.read([row if row < self.n else len(self.text) - 1 for row in rows])


def prompts(config: Sampling, teacher: Teacher) -> tuple[list[str], Table]:
    """The prompts as texts, and a table of their conditions that ends with that of the empty prompt."""
    data = config.text()
    feed = data.open(teacher, ())
    if isinstance(feed.text, Texts):
        texts = feed.text.texts[: min(config.n, feed.prompts)]
    else:
        texts = stored_texts(Path(config.cache), min(config.n, feed.prompts))
    return texts, PairTexts(feed.text, len(texts))


def open_or_create_index(folder: Path, config: Sampling, teacher: Teacher, texts: list[str], text: Table) -> Index:
    """The index of the pairs: the one in the folder if it has the same configuration, or a new one."""
    asked = {name: getattr(config, name) for name in ("seed", "steps", "guidance", "scheduler", "n", "precision")}
    index: Index = {
        "teacher": fingerprint(teacher.parts.folder),
        "shape": list(teacher.shape),
        "dtype": config.dtype,
        "prompts": len(texts),
        "sources": hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest(),
        "ode": asked | {"network": digest(teacher.parts.folder, [teacher.parts.network])},
    }
    if (old := resume(folder, index)) is not None:
        return old
    pairs = image_entry(config.writing, config.n, teacher.shape)
    pairs["per_shard"] = min(SHARD, config.n)
    index["tables"] = {
        "text": table_entry(config.writing, len(text), text.read(spread(len(text), SAMPLE))),
        "image": pairs,
    }
    return start_cache(folder, index, texts)


def deterministic(pairs: Trajectories) -> None:
    """ValueError if a sample is not a function of its noise."""
    first, again = (pairs.read([0])["x"] for _ in range(2))
    if (first - again).abs().max() > 1e-2 * first.abs().max():
        name = type(pairs.teacher.parts.scheduler()).__name__
        raise ValueError(
            f"the teacher's {name} adds noise of its own, so its samples are not an ODE's: pass --scheduler euler"
        )
