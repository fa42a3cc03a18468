"""Pairs of noise and the teacher's sample from it, for a regression onto its ODE (DMD, arXiv 2311.18828)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from distill.data import sources
from distill.data.index import INDEX, digest, read_index, texts, validate_teacher
from distill.data.online import SIZES, Texts
from distill.data.prefetch import FIXED, PrefetchingBatches
from distill.data.shards import Rows, Shards, Table
from distill.data.teacher import Teacher
from distill.method import Requirement
from distill.random import Draw
from distill.ranges import Calls, Finite
from distill.roles import Batch

COMMAND = "python -m pipelines.pairs --pretrained_model_name_or_path FOLDER --prompts prompts.txt --output_dir pairs"


def noise(seed: int, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The standard normal noise [B, *shape] of these pairs. It is a function of (seed, row), so it is not stored."""
    return Draw(seed, 0, "pairs", torch.tensor(rows)).normal("z", (len(rows), *shape))


class Trajectories:
    """A table of the teacher's samples "x" from the noise of each row, with the row of the "caption" among the texts.

    Row i has prompt i modulo the number of prompts. A cache with these rows as images holds pairs. A method that needs
    real images trains on the teacher's samples then.
    """

    def __init__(
        self, teacher: Teacher, text: Table, prompts: int, n: int, steps: int, guidance: float, seed: int = 0
    ) -> None:
        self.teacher = teacher
        self.text = text
        self.prompts = prompts
        self.n = n
        self.steps = steps
        self.guidance = guidance
        self.seed = seed

    def __len__(self) -> int:
        return self.n

    @torch.no_grad()
    def read(self, rows: Sequence[int]) -> Rows:
        captions = [row % self.prompts for row in rows]
        device = self.teacher.parts.device
        c = self.text.read(captions)
        c = {key: (v.float() if v.is_floating_point() else v).to(device) for key, v in c.items()}
        x = self.teacher.sample(noise(self.seed, rows, self.teacher.shape).to(device), c, self.steps, self.guidance)
        return {"x": x, "caption": torch.tensor(captions)}


class PrefetchingPairs(PrefetchingBatches):
    """data(draw) -> batch with noise "z", samples "y" [B, *shape], condition "c", and both as "real", "real_c"."""

    def __init__(
        self, text: Table, pairs: Table, prompts: int, names: list[str], seed: int, early: bool = True
    ) -> None:
        super().__init__(text, pairs, prompts, names, early=early)
        self.seed = seed

    def rows(self, draw: Draw) -> Batch:
        assert self.images is not None
        rows = draw.integers("pair", len(self.images)).tolist()
        stored = self.images.read(rows)
        z = noise(self.seed, rows, stored["x"].shape[1:])
        y = stored["x"]
        c = self.text.read(stored["caption"].tolist())
        return {"z": z, "y": y, "c": c, "real": y, "real_c": dict(c)}


@dataclass(frozen=True)
class Pairs:
    """Noise, the teacher's sample from it and their prompt, drawn uniformly with replacement."""

    pairs: Literal["cached", "online"] = "cached"  # online: sample while training, which is for trying things out
    cache: str = ""  # folder that `python -m pipelines.pairs` has made
    prompts: str = ""  # online: a table (.txt, .csv, .jsonl ...) or a dataset; one pair each
    steps: Calls = 50  # online: of the teacher
    guidance: Finite = 8.0  # online: of the teacher

    def validate(self, requirements: tuple[Requirement, ...]) -> None:
        """ValueError that says what is missing and how to make it. Of a cache, only the index is read."""
        if Requirement.FORGOTTEN_PROMPTS in requirements:
            raise ValueError("pairs of the teacher show what is to be forgotten: take prompts (distill.data.Text)")
        if self.pairs == "online":
            if not self.prompts or self.cache:
                raise ValueError(
                    "--data.pairs online samples pairs of --data.prompts prompts.txt, without --data.cache"
                )
            sources.locate(self.prompts)
            return
        if not self.cache:
            raise ValueError(f"no pairs given: make them once with\n  {COMMAND}\nand pass --data.cache pairs")
        if self.prompts:
            raise ValueError("a cache has its own prompts: leave out --data.prompts")
        if not (Path(self.cache) / INDEX).is_file():
            raise ValueError(f"no pairs at {self.cache!r}: make them with\n  {COMMAND}")
        if "ode" not in read_index(Path(self.cache)):
            raise ValueError(
                f"the images of the cache {self.cache} are not the teacher's: make pairs with\n  {COMMAND}"
            )

    def open(self, teacher: Teacher, requirements: tuple[Requirement, ...]) -> PrefetchingPairs:
        """ValueError if the pairs were made with another teacher or another of its networks."""
        feed = self._cached(teacher) if self.pairs == "cached" else self._online(teacher)
        if teacher.denoiser.null is None:  # sizes stay those of the image
            teacher.denoiser.null = {key: v for key, v in feed.empty().items() if key != SIZES}
        return feed

    def _cached(self, teacher: Teacher) -> PrefetchingPairs:
        folder = Path(self.cache)
        index = read_index(folder)
        validate_teacher(folder, index, teacher, False)
        if index["ode"]["network"] != digest(teacher.parts.folder, [teacher.parts.network]):
            raise ValueError(
                f"the pairs {folder} were sampled from {index['teacher']['name']!r}, whose {teacher.parts.network} is "
                f"another one than that of {teacher.parts.folder}: make pairs of this teacher with\n  {COMMAND}"
            )
        text, pairs = (Shards(folder, name, index["tables"][name]) for name in ("text", "image"))
        names = texts(folder, min(index["prompts"], FIXED))
        return PrefetchingPairs(text, pairs, index["prompts"], names, index["ode"]["seed"])

    def _online(self, teacher: Teacher) -> PrefetchingPairs:
        text = Texts(teacher, sources.prompts(self.prompts))
        pairs = Trajectories(teacher, text, text.prompts, text.prompts, self.steps, self.guidance)
        return PrefetchingPairs(text, pairs, text.prompts, text.texts[: min(text.prompts, FIXED)], 0, early=False)

    def smoke(self, folder: Path) -> Pairs:
        """Write eight prompts to `folder`; they are sampled online in two steps."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{color} {thing}" for color in ("a red", "a blue") for thing in ("cat", "dog", "house", "tree")]
        (folder / "prompts.txt").write_text("\n".join(names))
        return replace(self, pairs="online", cache="", prompts=f"{folder / 'prompts.txt'}", steps=2)
