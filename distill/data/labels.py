"""Class labels, images in one subfolder a class, and pairs of a class-conditional teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data import images
from distill.data.pairs import noise
from distill.data.sources import notice
from distill.data.teacher import Teacher
from distill.diffusion.guidance import CFG
from distill.diffusion.solver import sample
from distill.files import read_json
from distill.method import Requirement
from distill.random import Draw
from distill.ranges import Calls, Count, Finite, Natural, Seed
from distill.roles import Batch

NOTHING_TO_FORGET = "nothing to forget: pass --method.forget 0 --method.override 2, say: a class and its replacement"

BLOCK = 64  # pairs that are sampled at once
CLASS_NAMES = "class_names"  # in the distill.json of a teacher of own images: the names of its labels 0, 1, ...


def refuse_pairs(requirements: tuple[Requirement, ...]) -> None:
    """ValueError if the method requires pairs of the teacher: data that has none calls this."""
    if Requirement.PAIRS in requirements:
        raise ValueError(
            "this method needs pairs of the teacher, and --data has none: set its regression to 0, or write a recipe "
            "with data=Pairs(...) of distill.data.pairs, for class labels data=LabelPairs(...) of distill.data.labels"
        )


def select_labels(classes: tuple[int, ...], n: int) -> Tensor:
    """The selected class labels, int64; by default all of 0 .. n - 1. ValueError for other or repeated labels."""
    if wrong := [label for label in classes if not 0 <= label < n] or len({*classes}) < len(classes):
        raise ValueError(f"--data.classes is {classes}; it must be labels of 0 .. {n - 1}, each once: see {wrong}")
    return torch.tensor(classes or range(n))


def count_labels(teacher: Teacher) -> int | None:
    """The number of the network's labels, the null class included; None for a network without labels."""
    return getattr(getattr(teacher.denoiser.net, "config", None), "num_class_embeds", None)


class ClassImages(NamedTuple):
    """Images in one subfolder a class. Label i is the class names[i]."""

    names: tuple[str, ...]  # of the subfolders, sorted
    files: list[Path]
    labels: list[int]  # of the files
    notes: tuple[str, ...]  # files that are not read, and classes without images

    @property
    def counts(self) -> list[int]:
        """The number of images of each class."""
        counts = Counter(self.labels)
        return [counts[label] for label in range(len(self.names))]


def read_class_images(folder: str | Path) -> ClassImages:
    """The images of a folder by class: sorted by the names of its subfolders, then by path.

    Hidden files and folders are left out, links are followed. ValueError if there is no image in a subfolder.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"no folder of images at {str(folder)!r}")
    entries = sorted(path for path in Path(folder).iterdir() if not images.is_hidden(path.name))
    parts = {path.name: images.files(path) for path in entries if path.is_dir()}
    outside = [path for path in entries if images.is_image(path) and path.name not in parts]
    labelled = [(file, i) for i, files in enumerate(parts.values()) for file in files if images.is_image(file)]
    if not labelled:
        where = f"; it has {images.format_file_count(outside)} outside of subfolders" if outside else ""
        raise ValueError(f"{folder} has no images in one subfolder a class{where}: move the images of a class into one")
    files, labels = ([*column] for column in zip(*labelled, strict=True))
    return ClassImages(tuple(parts), files, labels, tuple(_describe_skipped(folder, parts, outside)))


def _describe_skipped(folder: str | Path, parts: dict[str, list[Path]], outside: list[Path]) -> Iterator[str]:
    """Lines on the files of classes that are no images, and on classes without one. outside: images beside classes."""
    if outside:
        yield f"{folder}: {images.format_file_count(outside)} outside of the classes skipped"
    if unread := images.describe_unread(chain.from_iterable(parts.values())):
        yield f"{folder}: {unread}"
    if empty := [name for name, files in parts.items() if not any(map(images.is_image, files))]:
        yield f"{folder}: classes without an image, which keep their label: {', '.join(empty)}"


def read_class_names(teacher: Teacher) -> tuple[str, ...]:
    """The names of a teacher's labels, from its distill.json; () if it stores none."""
    file = teacher.parts.folder / "distill.json"
    return tuple(read_json(file).get(CLASS_NAMES, ())) if file.is_file() else ()


def match_labels(names: tuple[str, ...], teacher: Teacher, classes: int, folder: str) -> list[int]:
    """The teacher's label of each class folder: by name if the teacher stores names, else in their order.

    ValueError for more classes than the teacher has, and for names that it does not store.
    """
    stored = read_class_names(teacher)
    if unknown := [name for name in names if stored and name not in stored]:
        raise ValueError(
            f"{folder} has the classes {', '.join(unknown[:9])}, which the teacher {teacher.parts.folder} does not "
            f"know; it knows {', '.join(stored[:9])}{', ...' * (len(stored) > 9)}: rename or remove these folders"
        )
    if len(names) > classes:
        raise ValueError(f"{folder} has {len(names)} classes, the teacher {classes}")
    return [stored.index(name) for name in names] if stored else [*range(len(names))]


@dataclass(frozen=True)
class Labels:
    """Uniform class labels of the teacher. Real images, where the method needs them, have labels of their own."""

    # folder with one subfolder a class; labels are numbered in the order of their names. The authors had
    # the teacher's training set: CIFAR-10 50,000 images, ImageNet 1,281,167 (docs/data.md)
    images: str = ""
    classes: tuple[Natural, ...] = ()  # labels of this student's part (Multi-Student); none given: all of the teacher's

    def validate(self, requirements: tuple[Requirement, ...]) -> None:
        refuse_pairs(requirements)
        if Requirement.FORGOTTEN_PROMPTS in requirements:
            raise ValueError(NOTHING_TO_FORGET)
        if Requirement.REAL in requirements and not self.images:
            raise ValueError("this method needs real images: pass --data.images, a folder with one subfolder a class")
        if self.images and not Path(self.images).is_dir():
            raise ValueError(f"no folder of images at {self.images!r}")
        if Requirement.REAL in requirements:
            images.validate_headers(self.class_images.files)

    @cached_property
    def class_images(self) -> ClassImages:
        return read_class_images(self.images)

    def open(self, teacher: Teacher, requirements: tuple[Requirement, ...]) -> Classes:
        data = Classes(teacher, self.classes)
        select_labels(self.classes, data.classes)
        if Requirement.REAL in requirements:
            names, files, labels, notes = self.class_images
            number = match_labels(names, teacher, data.classes, self.images)
            part = {*data.part.tolist()}
            data.files = [(file, number[i]) for file, i in zip(files, labels, strict=True) if number[i] in part]
            if len(names) < data.classes:
                few = f"{len(names)} classes, the teacher {data.classes}: {names[0]} has label {number[0]}"
                notes = (*notes, f"{self.images} has {few}, {names[-1]} {number[-1]}")
            notice(notes)
            if not data.files:
                raise ValueError(f"{self.images} has no images of --data.classes {' '.join(map(str, self.classes))}")
        return data

    def smoke(self, folder: Path) -> Labels:
        """Write random images of three classes to `folder`."""
        from PIL import Image

        random = np.random.default_rng(0)
        for i in range(6):
            path = folder / f"class-{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (10, 9 + i, 3), dtype=np.uint8)).save(path)
        return replace(self, images=f"{folder}", classes=tuple(label for label in self.classes if label < 3))


@dataclass(eq=False)
class Classes:
    """data(draw) -> batch with "c" and, where needed, "real" [B, *shape] in [-1, 1] with "real_c"."""

    teacher: Teacher
    only: tuple[int, ...]  # labels; none: all
    files: list[tuple[Path, int]] = field(default_factory=list)  # real images and their labels; none: not needed

    @cached_property
    def part(self) -> Tensor:
        """The labels of this student's part, int64."""
        return select_labels(self.only, self.classes)

    @cached_property
    def classes(self) -> int:
        """The number of the teacher's classes, without the null class. An unconditional teacher has one class."""
        return (count_labels(self.teacher) or 1) - (self.teacher.denoiser.null is not None)

    def __call__(self, draw: Draw) -> Batch:
        batch: Batch = {"c": self._c(self.part.to(draw.device)[draw.integers("label", len(self.part))])}
        if self.files:
            picked = [self.files[i] for i in draw.integers("real", len(self.files)).tolist()]
            labels = torch.tensor([label for _, label in picked], device=draw.device)
            real = torch.stack([self._image(file) for file, _ in picked]).to(draw.device)
            batch |= {"real": real, "real_c": self._c(labels)}
        return batch

    def fixed(self, n: int) -> tuple[list[int], dict[str, Tensor]]:
        """Labels of a grid of samples, and their condition."""
        labels = self.part[torch.arange(n) % len(self.part)]
        return labels.tolist(), self._c(labels)

    def _c(self, labels: Tensor) -> dict[str, Tensor]:
        return {"class_labels": labels}

    def _image(self, file: Path) -> Tensor:
        """The centre square of an image at the teacher's size, [C, H, W] in [-1, 1]."""
        from PIL import Image, ImageOps

        channels, side, _ = self.teacher.shape
        try:
            full = images.read(file).convert("L" if channels == 1 else "RGB")
        except images.UnreadableImage as error:
            raise error.in_training from None
        image = ImageOps.fit(full, (side, side), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(image).copy()).float() / 127.5 - 1
        return pixels.reshape(side, side, channels).permute(2, 0, 1)


@dataclass(frozen=True)
class LabelPairs:
    """Pairs of a class-conditional teacher: noise, the sample of Heun's method from it under a label, and that label.

    A run samples the pairs when it starts, in n (2 steps - 1) calls, and keeps them in memory. A resumed run has the
    same pairs. For teachers with prompts, `python -m pipelines.pairs` stores pairs.
    """

    n: Count = 1000  # pairs, of all labels in turn
    steps: Calls = 18  # of Heun's method
    guidance: Finite = 1.0  # of the teacher
    seed: Seed = 0  # of the noise

    def validate(self, requirements: tuple[Requirement, ...]) -> None:
        """ValueError for a method that needs more than pairs."""
        if Requirement.FORGOTTEN_PROMPTS in requirements:
            raise ValueError(NOTHING_TO_FORGET)
        if Requirement.REAL in requirements:
            raise ValueError("this method needs real images, and --data has pairs of the teacher alone")

    def open(self, teacher: Teacher, requirements: tuple[Requirement, ...]) -> ClassPairs:
        return ClassPairs(teacher, (), pairs=self)

    def smoke(self, folder: Path) -> LabelPairs:
        """Sixteen pairs of two steps."""
        return replace(self, n=16, steps=2)


@dataclass(eq=False)
class ClassPairs(Classes):
    """data(draw) -> batch with noise "z", samples "y" [B, *shape] and their condition "c"."""

    pairs: LabelPairs = LabelPairs()

    @torch.no_grad()
    def __post_init__(self) -> None:
        denoiser = self.teacher.denoiser
        rows = torch.arange(self.pairs.n)
        guided = CFG(denoiser, self.pairs.guidance)
        device = next(denoiser.net.parameters()).device
        self.labels = rows % self.classes
        self.z = noise(self.pairs.seed, rows.tolist(), self.teacher.shape)
        blocks = zip(self.z.to(device).split(BLOCK), self.labels.to(device).split(BLOCK), strict=True)
        self.y = torch.cat([sample(guided, z, self._c(labels), self.pairs.steps).cpu() for z, labels in blocks])

    def __call__(self, draw: Draw) -> Batch:
        pick = draw.integers("pair", self.pairs.n).cpu()
        z, y, labels = (found[pick].to(draw.device) for found in (self.z, self.y, self.labels))
        return {"z": z, "y": y, "c": self._c(labels)}
