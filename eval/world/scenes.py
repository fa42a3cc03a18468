"""Scenes of the world: their attributes, their captions, the splits of the captions, and images of them.

A scene is a row of indices, one for each attribute. Lengths are in units of 1/16 of the image's side, so that a scene
is the same picture at every resolution.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

UNITS = 16  # of length, to the side of an image
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.65, 0.25),
    "blue": (0.2, 0.3, 0.9),
    "yellow": (0.95, 0.85, 0.2),
    "white": (0.95, 0.95, 0.95),
}  # RGB in [0, 1]
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 2.5, "large": 3.9}  # radius
PLACES = {
    "top left": (4, 4),
    "top": (4, 8),
    "top right": (4, 12),
    "left": (8, 4),
    "center": (8, 8),
    "right": (8, 12),
    "bottom left": (12, 4),
    "bottom": (12, 8),
    "bottom right": (12, 12),
}  # row and column of the object's centre
RELATIONS = {
    "above": ((4, 8), (12, 8)),
    "below": ((12, 8), (4, 8)),
    "left of": ((8, 4), (8, 12)),
    "right of": ((8, 12), (8, 4)),
}  # centres of the first and of the second object
PALETTE = torch.tensor([*COLOURS.values()])  # [5, 3]
NEW_PAIRS = {("red", "triangle"), ("blue", "square"), ("green", "circle")}  # never together in the training split
UNSEEN_SHARE = 0.12  # of the other captions, which the training split lacks
SWELL = 0.06  # largest relative change of a radius
TINT = 0.05  # largest change of a colour's channel
SUBSAMPLES = 4  # a pixel's coverage is counted on so many points a side


def cover(geometry: Tensor, side: int) -> Tensor:
    """[B, side, side]: the share of each pixel inside an object.

    geometry [B, 4]: the shape's index in SHAPES, row and column of the centre, and radius, in units.
    """
    points = (torch.arange(side * SUBSAMPLES) + 0.5) * (UNITS / (side * SUBSAMPLES))
    shape, row, column, radius = geometry[:, :, None, None].unbind(1)  # [B, 1, 1]
    y = points[None, :, None] - row
    x = points[None, None, :] - column
    half = 0.886 * radius  # a square of the circle's area
    circle = y * y + x * x <= radius * radius
    square = (y.abs() <= half) & (x.abs() <= half)
    height = 0.94 * radius
    triangle = (y.abs() <= height) & (x.abs() <= 1.08 * radius * (y + height) / (2 * height))
    inside = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
    return functional.avg_pool2d(inside.float()[:, None], SUBSAMPLES)[:, 0]


@dataclass(frozen=True)
class Attribute:
    """One thing that a caption says. values: its words, whose index a scene holds."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class World(ABC):
    """Scenes with captions. side: pixels of an image; seed: of the choice of unseen captions.

    Splits: "train"; "unseen", captions that "train" lacks while it has all their pairs of a colour and a shape; "new",
    captions with a pair of NEW_PAIRS.
    """

    side: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.side < 16 or self.side % 8:
            raise ValueError(f"the world's side is {self.side} pixels: it must be a multiple of 8, at least 16")

    @property
    @abstractmethod
    def attributes(self) -> tuple[Attribute, ...]: ...

    @property
    @abstractmethod
    def objects(self) -> tuple[tuple[int, int], ...]:
        """For each object the columns of a scene with its colour and its shape. The last column is the background."""

    @abstractmethod
    def _words(self, values: Sequence[str]) -> str:
        """The caption of a scene with these values."""

    @abstractmethod
    def centres(self, scenes: Tensor) -> Tensor:
        """[B, objects, 2]: row and column of the objects' nominal centres, in units."""

    @abstractmethod
    def radii(self, scenes: Tensor) -> Tensor:
        """[B, objects]: nominal radii, in units."""

    @property
    @abstractmethod
    def jitter(self) -> float:
        """Largest distance of an object's centre from the nominal one, in units along each axis."""

    @cached_property
    def scenes(self) -> Tensor:
        """[N, attributes]: all scenes whose objects and background have different colours."""
        rows = itertools.product(*(range(len(attribute.values)) for attribute in self.attributes))
        columns = [colour for colour, _ in self.objects] + [len(self.attributes) - 1]
        return torch.tensor([row for row in rows if len({row[i] for i in columns}) == len(columns)])

    @cached_property
    def splits(self) -> dict[str, Tensor]:
        """The scenes of "train", "unseen" and "new"."""
        names = tuple(COLOURS)
        pairs = torch.tensor([(names.index(colour), SHAPES.index(shape)) for colour, shape in sorted(NEW_PAIRS)])
        new = torch.zeros(len(self.scenes), dtype=torch.bool)
        for columns in self.objects:
            new |= (self.scenes[:, None, columns] == pairs).all(2).any(1)
        share = torch.rand(len(self.scenes), generator=torch.Generator().manual_seed(self.seed))
        unseen = (share < UNSEEN_SHARE) & ~new
        return {"train": self.scenes[~new & ~unseen], "unseen": self.scenes[unseen], "new": self.scenes[new]}

    @cached_property
    def _scene_of(self) -> dict[str, tuple[int, ...]]:
        return {self.caption(scene): tuple(scene.tolist()) for scene in self.scenes}

    def caption(self, scene: Tensor | Sequence[int]) -> str:
        return self._words([a.values[int(i)] for a, i in zip(self.attributes, scene, strict=True)])

    def captions(self, split: str = "train") -> list[str]:
        if split not in self.splits:
            raise ValueError(f"{split!r} is no split of the world: choose one of {', '.join(self.splits)}")
        return [self.caption(scene) for scene in self.splits[split]]

    def parse(self, captions: Sequence[str]) -> Tensor:
        """[B, attributes]: the scenes of captions. ValueError for a caption that the world does not have."""
        rows = []
        for caption in captions:
            row = self._scene_of.get(" ".join(caption.lower().split()))
            if row is None:
                words = "; ".join(f"{a.name}: {', '.join(a.values)}" for a in self.attributes)
                raise ValueError(
                    f"the world has no scene {caption!r}. A caption reads like {self.caption(self.scenes[0])!r}; "
                    f"objects and background have different colours. The values are: {words}"
                )
            rows.append(row)
        return torch.tensor(rows).view(-1, len(self.attributes))

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The words of all captions, sorted."""
        return tuple(sorted({word for scene in self.scenes for word in self.caption(scene).split()}))

    @property
    def variations(self) -> int:
        """Numbers that vary an image within its caption: 3 of the background, 6 of each object."""
        return 3 + 6 * len(self.objects)

    def render(self, scenes: Tensor, variation: Tensor) -> Tensor:
        """Images [B, 3, side, side] in [-1, 1]. variation [B, variations] in [-1, 1]: tint, position and radius."""
        parts = variation.float().split([3, *([2, 1, 3] * len(self.objects))], 1)
        colour = PALETTE[scenes[:, -1]] + TINT * parts[0]
        images = colour[:, :, None, None].expand(-1, 3, self.side, self.side)
        for i, (colour_column, shape_column) in enumerate(self.objects):
            position, swell, tint = parts[1 + 3 * i : 4 + 3 * i]
            centre = self.centres(scenes)[:, i] + self.jitter * position
            radius = self.radii(scenes)[:, i] * (1 + SWELL * swell[:, 0])
            geometry = torch.stack([scenes[:, shape_column], *centre.unbind(1), radius], 1)
            share = cover(geometry, self.side)[:, None]
            colour = PALETTE[scenes[:, colour_column]] + TINT * tint
            images = images * (1 - share) + colour[:, :, None, None] * share
        return images.clamp(0, 1) * 2 - 1

    def draw(self, scenes: Tensor, seed: int) -> Tensor:
        """Images [B, 3, side, side] in [-1, 1] of scenes, varied by a generator of this seed."""
        generator = torch.Generator().manual_seed(seed)
        return self.render(scenes, torch.rand(len(scenes), self.variations, generator=generator) * 2 - 1)


class OneObject(World):
    """A small or large object at one of nine places: 1,080 captions."""

    attributes = (
        Attribute("size", tuple(SIZES)),
        Attribute("colour", tuple(COLOURS)),
        Attribute("shape", SHAPES),
        Attribute("place", tuple(PLACES)),
        Attribute("background", tuple(COLOURS)),
    )
    objects = ((1, 2),)
    jitter = 0.5

    def _words(self, values: Sequence[str]) -> str:
        size, colour, shape, place, background = values
        return f"a {size} {colour} {shape} at the {place} on a {background} background"

    def centres(self, scenes: Tensor) -> Tensor:
        return torch.tensor([*PLACES.values()], dtype=torch.float32)[scenes[:, 3]][:, None]

    def radii(self, scenes: Tensor) -> Tensor:
        return torch.tensor([*SIZES.values()])[scenes[:, 0]][:, None]


class TwoObjects(World):
    """Two objects of one size in a relation: 2,160 captions. The hard level."""

    attributes = (
        Attribute("first colour", tuple(COLOURS)),
        Attribute("first shape", SHAPES),
        Attribute("relation", tuple(RELATIONS)),
        Attribute("second colour", tuple(COLOURS)),
        Attribute("second shape", SHAPES),
        Attribute("background", tuple(COLOURS)),
    )
    objects = ((0, 1), (3, 4))
    jitter = 0.7
    radius = 3.0

    def _words(self, values: Sequence[str]) -> str:
        colour, shape, relation, other_colour, other_shape, background = values
        return f"a {colour} {shape} {relation} a {other_colour} {other_shape} on a {background} background"

    def centres(self, scenes: Tensor) -> Tensor:
        return torch.tensor([*RELATIONS.values()], dtype=torch.float32)[scenes[:, 2]]

    def radii(self, scenes: Tensor) -> Tensor:
        return torch.full((len(scenes), 2), self.radius)


WORLDS = {"world": OneObject, "world-two": TwoObjects}


def load_world(name: str, side: int = 16, seed: int = 0) -> World:
    if name not in WORLDS:
        raise ValueError(f"{name!r} is no world: choose one of {', '.join(WORLDS)}")
    return WORLDS[name](side, seed)
