"""Data as pure functions of (seed, step, global sample index): a restart needs no saved state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distill.data import sources
from distill.data.forget_words import Words
from distill.data.index import command, read_index, texts, validate_teacher
from distill.data.labels import NOTHING_TO_FORGET, count_labels, refuse_pairs, select_labels
from distill.data.online import SIZES, Images, Texts
from distill.data.prefetch import FIXED, PrefetchingBatches
from distill.data.shards import Shards, Table
from distill.data.sources import Pictures
from distill.data.teacher import Teacher
from distill.diffusion.guidance import with_override
from distill.method import Requirement
from distill.random import Draw
from distill.ranges import Count, Natural, UnitInterval, validate_ranges
from distill.roles import Batch

ONLINE = (
    "prompts",
    "images",
    "prompt_column",
    "caption_column",
    "image_column",
    "crops",
    "max_samples",
    "skip_incomplete",
)
CACHE = "python -m pipelines.cache"
DIGITS_TRAIN = 1200  # of 1,797 scans; the other 597 are held out and never trained on


@cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's bundled handwritten digits: images [N, 1, 8, 8] in [-1, 1] and labels [N] of 0..9.

    `split` is "train" (1,200 scans) or "heldout" (597), one fixed random partition.
    """
    from sklearn.datasets import load_digits

    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pick = order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]
    images = torch.tensor(data.images[pick], dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target[pick])


@dataclass(frozen=True)
class Digits:
    """Conditions are uniform class labels. Real images come from the training split, with their own labels."""

    classes: tuple[Natural, ...] = ()  # labels of this student's part (Multi-Student); none given: all ten

    def __post_init__(self) -> None:
        select_labels(self.classes, 10)

    def validate(self, requirements: tuple[Requirement, ...]) -> None:
        """ValueError for SFD without a class to forget, and for a method of pairs."""
        refuse_pairs(requirements)
        if Requirement.FORGOTTEN_PROMPTS in requirements:
            raise ValueError(NOTHING_TO_FORGET)

    def open(self, teacher: Teacher, requirements: tuple[Requirement, ...]) -> Digits:
        known = count_labels(teacher)
        if known is not None and known <= int(select_labels(self.classes, 10).max()):
            raise ValueError(
                f"the teacher knows the labels 0 .. {known - 1}, and the digits have ten: give --data.classes, labels "
                "that the teacher knows, or a teacher of all digits"
            )
        return self

    def fixed(self, n: int = 40) -> tuple[list[int], dict[str, Tensor]]:
        """Labels of a grid of samples, and their condition."""
        part = select_labels(self.classes, 10)
        labels = part[torch.arange(n) % len(part)]
        return labels.tolist(), {"class_labels": labels}

    def __call__(self, draw: Draw) -> Batch:
        images, labels = digits("train")
        part = select_labels(self.classes, 10)
        candidates = torch.isin(labels, part).nonzero()[:, 0]
        pick = candidates[draw.integers("real", len(candidates)).cpu()]
        return {
            "c": {"class_labels": part.to(draw.device)[draw.integers("label", len(part))]},
            "real": images[pick].to(draw.device),
            "real_c": {"class_labels": labels[pick].to(draw.device)},
        }


@dataclass(frozen=True)
class Text:
    """Prompts, and real images with captions. Images are drawn independently of the prompts.

    Rows are drawn uniformly with replacement, by (seed, step, player, sample). So there is no order to save.
    """

    text: Literal["cached", "online"] = "cached"  # online: encode while training, which keeps the encoders in memory
    cache: str = ""  # output folder of `python -m pipelines.cache`
    # online: a table (.txt, .csv, .jsonl ...) or a dataset; "": the captions of the images. A run draws
    # max_train_steps x train_batch_size of them, so fewer repeat; DMD2's authors had 3,000,000 (docs/data.md)
    prompts: str = ""
    # online: a folder, tar shards 'x/{00..12}.tar' or a dataset. DMD2's authors had 500,000 images, LCM's 650,000; a
    # subject needs a few (docs/data.md)
    images: str = ""
    prompt_column: str | None = None  # column of the prompts; None: text, caption or prompt
    caption_column: str | None = None  # column of the captions; None: text, caption or prompt
    image_column: str = "image"  # column of the images in a dataset
    crops: Natural = 0  # online: random crops of each image; 0: its centre square
    squeeze: bool = False  # online: resize the full image to the square (DMD2); for a cache use its --squeeze
    max_samples: Count | None = None  # online: use the first prompts and images only
    skip_incomplete: bool = False  # online: leave out images without a caption, and rows of metadata without an image
    p_empty: UnitInterval = 0.0  # probability of replacing a prompt or caption by the empty one
    forget: tuple[str, ...] = ()  # SFD: words to forget; the student forgets prompts with them
    override: tuple[str, ...] = ()  # SFD: the replacement of each of these words in the teacher's prompt

    @property
    def words(self) -> Words:
        return Words(self.forget, self.override)

    def validate(self, requirements: tuple[Requirement, ...]) -> None:
        """ValueError that says what is missing and how to make it. Of a cache, only the index is read."""
        validate_ranges(self, "--data.")
        real = Requirement.REAL in requirements
        refuse_pairs(requirements)
        if Requirement.FORGOTTEN_PROMPTS in requirements and not self.forget:
            raise ValueError('nothing to forget: pass --data.forget "Brad Pitt" --data.override "a man", say')
        if self.forget and Requirement.FORGOTTEN_PROMPTS not in requirements:
            raise ValueError(
                f"--data.forget is {self.forget}, which SFD alone reads, without --method.forget: leave it out"
            )
        self.words.validate()
        if self.squeeze and self.crops:
            raise ValueError(f"--data.squeeze leaves nothing for --data.crops {self.crops}: pass --data.no_squeeze")
        if self.text == "cached":
            self._validate_cache(real)
        else:
            self._validate_online(real)

    def _validate_cache(self, real: bool) -> None:
        if not self.cache:
            online = f"--data.text online --data.prompts prompts.txt{' --data.images IMAGES' * real}"
            raise ValueError(
                f"no data given: encode it once with\n  {command(real)}\nand pass --data.cache cache; "
                f"or encode while training, with {online}"
            )
        if others := [name for name in ONLINE if getattr(self, name) != getattr(Text, name)]:
            raise ValueError(f"a cache has its own prompts and images: leave out --data.{' and --data.'.join(others)}")
        index = read_index(Path(self.cache), real)
        if real and "image" not in index["tables"]:
            raise ValueError(
                f"the cache {self.cache} has no images, which this method needs: make one with\n  {command(True)}"
            )

    def _validate_online(self, real: bool) -> None:
        if self.cache:
            raise ValueError("--data.cache is read with --data.text cached; leave it out or choose one of the two")
        if not (self.prompts or self.images):
            raise ValueError("no data given: pass --data.prompts prompts.txt, or images with captions as --data.images")
        if real and not self.images:
            raise ValueError(
                "this method needs real images: pass --data.images, a folder, tar shards or a dataset "
                "(how many: docs/data.md#how-many)"
            )
        located = [sources.locate(source) for source in filter(None, (self.prompts, self.images))]
        if any(source.kind == "dataset" for source in located):
            return  # it is downloaded once the teacher is known to exist
        _, pictures = self.sources
        if real and pictures is not None:
            pictures.validate_headers(f"replace or remove them, or make a cache with {CACHE} --skip_broken")

    def open(self, teacher: Teacher, requirements: tuple[Requirement, ...]) -> PrefetchingBatches:
        """The data for `teacher`. A teacher without a null condition gets the empty prompt as its `null`.

        ValueError if the cache was made for another teacher.
        """
        read = self._cached if self.text == "cached" else self._online
        feed = PrefetchingBatches(*read(teacher, Requirement.REAL in requirements), self.p_empty)
        if Requirement.REWARD in requirements:
            feed.texts = self._texts(feed.text)
        if teacher.denoiser.null is None:  # sizes stay those of the image
            teacher.denoiser.null = {key: v for key, v in feed.empty().items() if key != SIZES}
        if self.forget:
            where = f"the cache {self.cache}" if self.text == "cached" else self.prompts or self.images
            feed.override(self.words.override_rows(self._texts(feed.text), feed.prompts, where))
            teacher.denoiser.null = with_override(teacher.denoiser.null, teacher.denoiser.null)
        return feed

    def _cached(self, teacher: Teacher, real: bool) -> tuple[Table, Table | None, int, list[str]]:
        folder = Path(self.cache)
        index = read_index(folder, real)
        validate_teacher(folder, index, teacher, real)
        if real and self.squeeze and not index.get("squeeze", True):
            sources.notice([f"{folder} holds cropped images; those of this recipe are squeezed: {CACHE} --squeeze"])
        table = lambda name: Shards(folder, name, index["tables"][name])
        names = texts(folder, min(index["prompts"], FIXED))
        return table("text"), table("image") if real else None, index["prompts"], names

    def _online(self, teacher: Teacher, real: bool) -> tuple[Table, Table | None, int, list[str]]:
        prompts, pictures = self.sources
        captions = pictures.captions if pictures else []
        prompt_texts = prompts or [*dict.fromkeys(captions)]
        replaced = map(self.words.replace_words, prompt_texts if self.forget else [])
        text = Texts(teacher, prompt_texts, [*captions, *(other for other in replaced if other is not None)])
        images = (
            Images(teacher, pictures, text.captions, self.crops, self.squeeze)
            if real and pictures is not None
            else None
        )
        return text, images, text.prompts, text.texts[: min(text.prompts, FIXED)]

    def _texts(self, table: Table) -> list[str]:
        if isinstance(table, Texts):
            return table.texts
        return [*texts(Path(self.cache), len(table) - 1), ""]

    @cached_property
    def sources(self) -> tuple[list[str], Pictures | None]:
        """(all prompts, the images with their captions). They are read once; stderr says what is skipped."""
        limit = self.max_samples
        prompts = sources.prompts(self.prompts, self.prompt_column, limit) if self.prompts else []
        if not self.images:
            return prompts, None
        columns = (self.image_column, self.caption_column)
        pictures = sources.pictures(self.images, *columns, limit, self.skip_incomplete)
        sources.notice(pictures.notes)
        return prompts, pictures

    def smoke(self, folder: Path) -> Text:
        """Write eight prompts and random images to `folder`; they are encoded online."""
        from PIL import Image

        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{color} {thing}" for color in ("a red", "a blue") for thing in ("cat", "dog", "house", "tree")]
        (folder / "prompts.txt").write_text("\n".join([*names, *(f"a photo of {word}" for word in self.forget)]))
        random = np.random.default_rng(0)
        for i, name in enumerate(names):
            Image.fromarray(random.integers(0, 256, (24, 20 + i, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(name)
        given = Text("online", prompts=f"{folder / 'prompts.txt'}", images=f"{folder}", p_empty=self.p_empty)
        return replace(given, squeeze=self.squeeze, forget=self.forget, override=self.override)
