"""Folders of the captioned world: data to train on, and what images of a model show.

python -m eval.world data runs/world/data                  prompts.txt and images/ with captions, for any recipe
python -m eval.world prompts runs/world/new.txt --split new
python -m eval.world score runs/samples/dmd2               accuracies with intervals, spread within a caption
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro

from distill.files import write_atomically
from eval.cli import run
from eval.images import images
from eval.metrics.intervals import Score, proportion
from eval.world.checker import compare_scenes, inspect
from eval.world.scenes import World, load_world

Folder = Annotated[Path, tyro.conf.Positional]
METADATA = "metadata.jsonl"


def write_data(out: Folder, world: str = "world", side: int = 16, n: int = 1500, seed: int = 0) -> None:
    """Write the training captions, one a line, to OUT/prompts.txt, and n images with captions to OUT/images.

    Args:
        out: an absent or empty folder.
        world: world, one object; world-two, two objects in a relation.
        side: pixels of an image's side.
        n: images; captions take turns.
        seed: of the variation within a caption.
    """
    scene_world = load_world(world, side)
    captions = scene_world.captions()
    pick = torch.arange(n) % len(captions)
    pictures = scene_world.draw(scene_world.splits["train"][pick], seed)
    images.write_folder(out / "images", pictures, name=world)
    rows = [{"file_name": images.file_name(i), "text": captions[j]} for i, j in enumerate(pick.tolist())]
    write_atomically(out / "images" / METADATA, "".join(f"{json.dumps(row)}\n" for row in rows))
    write_atomically(out / "prompts.txt", "".join(f"{caption}\n" for caption in captions))


def write_prompts(out: Folder, world: str = "world", split: str = "train", n: int | None = None, seed: int = 0) -> None:
    """Write n captions of a split to a file, one a line; captions take turns in an order of this seed.

    Args:
        out: the file.
        world: world or world-two.
        split: train, unseen (captions that were not trained) or new (pairs of colour and shape that were not).
        n: captions; by default each once.
        seed: of the order.
    """
    captions = load_world(world).captions(split)
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))
    lines = [captions[order[i % len(captions)]] for i in range(n or len(captions))]
    write_atomically(out, "".join(f"{line}\n" for line in lines))


def score(folder: Folder, world: str = "world") -> dict[str, Score | float]:
    """Print what the images of a folder show of their prompts, and return it.

    Args:
        folder: images with metadata.jsonl, as eval.generate writes them.
        world: world or world-two, of which the prompts are captions.
    """
    pictures, _, _ = images.read_folder(folder)
    prompts = read_prompts(folder, len(pictures))
    scene_world = load_world(world, pictures.shape[-1])
    figures = measure(scene_world, pictures, scene_world.parse(prompts))
    for name, figure in figures.items():
        text = (
            f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
            if isinstance(figure, Score)
            else f"{figure:.3f}"
        )
        sys.stdout.write(f"{name:24} {text}\n")
    return figures


def read_prompts(folder: Path, n: int) -> list[str]:
    path = folder / METADATA
    if not path.is_file():
        raise ValueError(f"{folder} has no {METADATA} with the images' prompts: generate it with --prompts FILE")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if len(rows) != n:
        raise ValueError(f"{path} has {len(rows)} prompts for {n} images; generate the folder again")
    return [row["text"] for row in sorted(rows, key=lambda row: row["file_name"])]


def measure(world: World, pictures: torch.Tensor, scenes: torch.Tensor) -> dict[str, Score | float]:
    """Accuracies with Wilson's intervals; the residual's mean; spread within a caption as a share of real images'."""
    shown = compare_scenes(world, pictures, scenes)
    figures: dict[str, Score | float] = {
        attribute.name: proportion(shown.correct[:, i]) for i, attribute in enumerate(world.attributes)
    }
    figures["clean"] = proportion(shown.clean)
    figures["all"] = proportion(shown.right)
    figures["residual"] = float(inspect(pictures, len(world.objects)).residual.mean())
    real = compare_scenes(world, world.draw(scenes, 1), scenes).spread()
    return figures | {f"spread of {name}": value / real[name] for name, value in shown.spread().items()}


def main() -> None:
    run({"data": write_data, "prompts": write_prompts, "score": score})
