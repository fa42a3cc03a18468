"""Export a folder of images in the layout of GenEval or DPG-Bench. Their scorers run in their own environments.

python -m eval.generate --model FOLDER --prompts evaluation_metadata.jsonl --per_prompt 4 --out runs/samples/geneval
python -m eval.layouts --folder runs/samples/geneval --layout geneval --prompts evaluation_metadata.jsonl --out OUT

geneval  OUT/00000/samples/00000.png ... and OUT/00000/metadata.jsonl, the line of its prompt (djghosh13/geneval)
dpg      OUT/NAME.png, the first four images of prompt NAME.txt as a grid of two by two (TencentQQGYLab/ELLA, dpg_bench;
         its --resolution is the side of one image)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch

from distill.files import atomic_folder
from eval.files import check_output, read_text
from eval.images import images as folders
from eval.sampling.conditions import SampleConditions, read_prompts

GRID = 4  # images of a prompt that DPG-Bench reads


def export(folder: Path, layout: Literal["geneval", "dpg"], prompts: Path, out: Path) -> int:
    """Write the images of `folder` in the layout of a benchmark, atomically. Returns the number of prompts.

    Args:
        folder: made by `generate` from these prompts, with some images of each: four for DPG-Bench.
        layout: of which benchmark.
        prompts: GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of .txt files.
        out: where the layout goes; a folder that is not there yet.
    """
    manifest = folders.read_manifest(folder)
    _validate_source(layout, prompts)
    check_output(out, "--out", folder=True)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another folder")
    texts = read_prompts(f"{prompts}")
    n = manifest.get("n", 0)
    each = n // len(texts)
    conditions = SampleConditions([texts[i // each] for i in range(n)], True) if each else None
    if conditions is None or n != each * len(texts) or conditions.hash != manifest.get("prompts"):
        raise ValueError(
            f"{folder} holds {n} images that were not made from the {len(texts)} prompts of {prompts}; generate them "
            f"with --prompts {prompts} --per_prompt 4"
        )
    if layout == "dpg" and each < GRID:
        raise ValueError(f"{folder} holds {each} image(s) of a prompt; DPG-Bench reads {GRID}: use --per_prompt {GRID}")
    with atomic_folder(out) as part:
        if layout == "geneval":
            _geneval(folder, part, _read_json_lines(prompts), each)
        else:
            _dpg(folder, part, [file.stem for file in sorted(prompts.glob("*.txt"))], each)
    return len(texts)


def _validate_source(layout: str, prompts: Path) -> None:
    is_source = prompts.is_dir() if layout == "dpg" else prompts.suffix == ".jsonl"
    if not is_source:
        source = "evaluation_metadata.jsonl" if layout == "geneval" else "the folder of its .txt files"
        raise ValueError(f"prompts of {layout} are {source}, not {prompts}")


def _read_json_lines(path: Path) -> list[str]:
    """The lines of a .jsonl file, each in json's own format."""
    lines = [line for line in read_text(path, "give another file").split("\n") if line.strip()]
    return [json.dumps(json.loads(line)) for line in lines]


def _geneval(folder: Path, out: Path, lines: list[str], each: int) -> None:
    for k, line in enumerate(lines):
        samples = out / f"{k:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(line + "\n")
        for j in range(each):
            shutil.copy(folder / folders.file_name(k * each + j), samples / f"{j:05d}.png")


def _dpg(folder: Path, out: Path, names: list[str], each: int) -> None:
    from PIL import Image

    for k, name in enumerate(names):
        first = [folders.read_levels(folder / folders.file_name(k * each + j)) for j in range(GRID)]
        rows = [torch.cat(pair, dim=2) for pair in (first[:2], first[2:])]
        grid = torch.cat(rows, dim=1).permute(1, 2, 0).expand(-1, -1, 3)
        Image.fromarray(grid.contiguous().numpy()).save(out / f"{name}.png")


def main() -> None:
    """Command line of `export`."""
    from eval.cli import run

    print(f"{run(export)} prompts exported")
