"""What an image shows, by least squares against templates of every shape, position and radius.

The background is the median of each channel. The object is the template that explains most of what differs from the
background; its colour is the least-squares fit. The residual is what the templates leave over: noise, ghosts and other
objects raise it; blur raises its share of all that differs from the background.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from eval.world.scenes import PALETTE, SHAPES, SIZES, UNITS, World, cover

CLEAN = 0.06  # largest residual of a clean image; of 2,000 real ones it is at most .04
CLEAN_SHARE = 0.3  # the same as a share of all that differs from the background; of real ones at most .18
COLOUR_DISTANCE = 0.25  # a colour farther from all of the palette is none of them
PLACE_DISTANCE = 1.25  # units beyond the jitter's .5 along an axis, where an object is at another place or at none
RELATION_DISTANCE = 1.75  # the same for two objects
STEP = 0.5  # between templates' positions, in units
RADII_STEP = 0.2  # between their radii
RADII = tuple(2.1 + RADII_STEP * i for i in range(13))
AROUND = torch.tensor([-1.0, 0.0, 1.0])
BATCH = 200  # images that are compared at once


@dataclass(frozen=True)
class Templates:
    """geometry [T, 4]: shape, row, column, radius. coverage [T, pixels]; energy [T]: its squared norm."""

    geometry: Tensor
    coverage: Tensor
    energy: Tensor


@cache
def load_templates(side: int) -> Templates:
    """All templates at a resolution: 20,631, 21 MB at 16 x 16 and 84 MB at 32 x 32."""
    positions = torch.arange(2.5, UNITS - 2.5 + STEP / 2, STEP)
    shapes = torch.arange(len(SHAPES), dtype=torch.float32)
    geometry = torch.cartesian_prod(shapes, torch.tensor(RADII), positions, positions)[:, [0, 2, 3, 1]]
    coverage = torch.cat([cover(part, side) for part in geometry.split(500)]).flatten(1)
    return Templates(geometry, coverage, coverage.square().sum(1))


@dataclass(frozen=True)
class Inspection:
    """What images show. O objects, the most visible first; colours: index in the palette, -1 where none fits."""

    geometry: Tensor  # [B, O, 4]: shape, row, column, radius
    colours: Tensor  # [B, O]
    colour_values: Tensor  # [B, O, 3] in [0, 1]
    background: Tensor  # [B]
    background_values: Tensor  # [B, 3] in [0, 1]
    residual: Tensor  # [B]: rms of what is left over, pixels in [0, 1]
    share: Tensor  # [B]: residual / rms of all that differs from the background


@torch.no_grad()
def inspect(images: Tensor, objects: int) -> Inspection:
    """The objects in images [B, 3, side, side] in [-1, 1]. Takes about .7 ms an image and object at 16 x 16."""
    return _join([_inspect_batch(part, objects) for part in images.float().split(BATCH)])


def _join(parts: list[Inspection]) -> Inspection:
    return Inspection(*(torch.cat([getattr(p, name) for p in parts]) for name in Inspection.__dataclass_fields__))


def _inspect_batch(images: Tensor, objects: int) -> Inspection:
    templates = load_templates(images.shape[-1])
    pixels = (images.clamp(-1, 1).flatten(2) + 1) / 2  # [B, 3, P]
    background = pixels.median(2).values
    rest = pixels - background[:, :, None]
    everything = rest.square().mean((1, 2)).sqrt()
    geometry = []
    values = []
    for _ in range(objects):
        product = rest @ templates.coverage.T  # [B, 3, T]
        best = (product.square().sum(1) / templates.energy).argmax(1)
        place = _refine(rest, templates.geometry[best], images.shape[-1])
        share = cover(place, images.shape[-1]).flatten(1)[:, None]  # [B, 1, P]
        contrast = (rest * share).sum(2) / share.square().sum(2)  # [B, 3]
        rest = rest - contrast[:, :, None] * share
        geometry.append(place)
        values.append(background + contrast)
    colour_values = torch.stack(values, 1)
    residual = rest.square().mean((1, 2)).sqrt()
    return Inspection(
        geometry=torch.stack(geometry, 1),
        colours=_nearest_colour(colour_values),
        colour_values=colour_values,
        background=_nearest_colour(background),
        background_values=background,
        residual=residual,
        share=residual / everything.clamp(min=1e-6),
    )


def _refine(rest: Tensor, geometry: Tensor, side: int) -> Tensor:
    """Geometries [B, 4] that explain more of `rest` [B, 3, P] than the templates: position and radius in turn."""
    steps = (0.0, STEP, STEP, RADII_STEP)
    for fraction, columns in ((0.5, (1, 2)), (0.5, (3,)), (0.25, (1, 2)), (0.25, (3,))):
        zero = torch.zeros(1)
        offsets = torch.cartesian_prod(*(fraction * steps[i] * AROUND if i in columns else zero for i in range(4)))
        near = geometry[:, None] + offsets  # [B, N, 4]
        share = cover(near.flatten(0, 1), side).view(len(rest), len(offsets), -1)  # [B, N, P]
        product = torch.einsum("bcp,bnp->bnc", rest, share)
        best = (product.square().sum(2) / share.square().sum(2)).argmax(1)
        geometry = near[torch.arange(len(rest)), best]
    return geometry


def _nearest_colour(values: Tensor) -> Tensor:
    distance = (values[..., None, :] - PALETTE).norm(dim=-1).min(-1)
    return torch.where(distance.values < COLOUR_DISTANCE, distance.indices, -1)


@dataclass(frozen=True)
class Agreement:
    """Images against their captions. The last three are of the first object and the background."""

    correct: Tensor  # [B, attributes]
    clean: Tensor  # [B]: nothing but the objects and the background
    position: Tensor  # [B, 2]: row and column minus the nominal centre, in units
    radius: Tensor  # [B]: relative difference from the nominal radius
    tint: Tensor  # [B, 3]: background minus its nominal colour

    @property
    def right(self) -> Tensor:
        """[B]: every attribute is correct and the image is clean."""
        return self.correct.all(1) & self.clean

    def accuracies(self, world: World) -> dict[str, float]:
        """Share of images by attribute, "clean" and "all"."""
        shares = {a.name: float(self.correct[:, i].float().mean()) for i, a in enumerate(world.attributes)}
        return shares | {"clean": float(self.clean.float().mean()), "all": float(self.right.float().mean())}

    def spread(self) -> dict[str, float]:
        """Standard deviation within a caption of position (units), radius (relative) and tint, of correct images."""
        right = self.correct.all(1)
        if right.sum() < 2:
            return dict.fromkeys(("position", "radius", "tint"), 0.0)
        return {
            "position": float(self.position[right].std(0).mean()),
            "radius": float(self.radius[right].std()),
            "tint": float(self.tint[right].std(0).mean()),
        }


def compare_scenes(world: World, images: Tensor, scenes: Tensor) -> Agreement:
    """Whether images [B, 3, side, side] in [-1, 1] show scenes [B, attributes]."""
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} images, but {len(scenes)} scenes: give one scene for each image")
    if images.shape[1:] != (3, world.side, world.side):
        raise ValueError(f"images are {tuple(images.shape[1:])}; this world's are (3, {world.side}, {world.side})")
    found = inspect(images, len(world.objects))
    orders = [found] if len(world.objects) == 1 else [found, _swap(found)]
    correct = torch.stack([_compare(world, order, scenes) for order in orders])  # [orders, B, attributes]
    best = correct.float().sum(2).argmax(0)
    rows = torch.arange(len(scenes))
    geometry = torch.stack([order.geometry for order in orders])[best, rows]
    return Agreement(
        correct=correct[best, rows],
        clean=(found.residual < CLEAN) & (found.share < CLEAN_SHARE),
        position=geometry[:, 0, 1:3] - world.centres(scenes)[:, 0],
        radius=geometry[:, 0, 3] / world.radii(scenes)[:, 0] - 1,
        tint=found.background_values - PALETTE[scenes[:, -1]],
    )


def _swap(found: Inspection) -> Inspection:
    return Inspection(
        found.geometry.flip(1),
        found.colours.flip(1),
        found.colour_values.flip(1),
        found.background,
        found.background_values,
        found.residual,
        found.share,
    )


def _compare(world: World, found: Inspection, scenes: Tensor) -> Tensor:
    """[B, attributes]: the objects in their order against the scenes."""
    correct = torch.zeros(scenes.shape, dtype=torch.bool)
    correct[:, -1] = found.background == scenes[:, -1]
    for i, (colour, shape) in enumerate(world.objects):
        correct[:, colour] = found.colours[:, i] == scenes[:, colour]
        correct[:, shape] = found.geometry[:, i, 0] == scenes[:, shape]
    distance = (found.geometry[:, :, 1:3] - world.centres(scenes)).abs().amax((1, 2))
    if len(world.objects) == 1:
        correct[:, 3] = distance <= PLACE_DISTANCE
        large = found.geometry[:, 0, 3] > sum(SIZES.values()) / len(SIZES)
        correct[:, 0] = large == (scenes[:, 0] == 1)
    else:
        correct[:, 2] = distance <= RELATION_DISTANCE
    return correct
