"""A pipeline -> a folder of images. The noise of image i depends on (seed, i) alone.

python -m eval.generate --model runs/dmd2/pipeline --prompts prompts.txt --out runs/samples/dmd2
python -m eval.generate --model stabilityai/sdxl-turbo --protocol coco10k-dmd2 --steps 1 --guidance 0 --out ...
python -m eval.generate --model sdxl-dmd2 --first sdxl --prompts prompts.txt --out ...     pipelines/inference/stitch.py
python -m eval.generate --model my_4step_lora.safetensors --base FOLDER --steps 4 --guidance 0 --prompts ... --out ...
accelerate launch -m eval.generate ...          processes share the images; a killed command continues

An image is bitwise the same for any number of processes, any --batch and any images that a restart finds missing. Sums
of floats depend on the number of rows in a network's call, which selects the kernels: 4e-7 to 3e-6 of an image in
[0, 1] between 1 and 8 rows of the tiny pipelines, float32 on the CPU. They do not depend on the other rows (0). So
every call has `rows` rows: a call with fewer images repeats the last one. The manifest holds `rows`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.files import folder_lock
from eval.files import write_json
from eval.images import images as folders
from eval.images.manifest import Manifest
from eval.sampling.conditions import SampleConditions
from eval.sampling.cost import git_commit, hardware, measure_cost
from eval.sampling.request import Sampling
from eval.sampling.sampler import Sampler, image_generator


def generate(
    model: str | Path, out: str | Path, n: int | None = None, steps: int | None = None, **others: Any
) -> Manifest:
    """`generate_images` of `Sampling(...)`: the manifest of a folder of images."""
    return generate_images(Sampling(str(model), Path(out), n, steps, **others))


class ProcessGroup:
    """The processes of `accelerate launch` or torchrun, or this one alone."""

    def __init__(self) -> None:
        from pipelines.launch import start_accelerator, warn_single_process

        self.accelerator = None
        self.index = 0
        self.count = 1
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            warn_single_process()
        else:
            self.accelerator = start_accelerator(days=7)  # for one that has more left to make
            self.index = self.accelerator.process_index
            self.count = self.accelerator.num_processes

    def device(self, name: str | None) -> torch.device:
        if name is not None or self.accelerator is None:
            return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        return self.accelerator.device

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def gather(self, value: RankResult) -> list[RankResult]:
        """The values of all processes."""
        if self.accelerator is None:
            return [value]
        values: list[RankResult | None] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return [result for result in values if result is not None]


@dataclass
class RankResult:
    """The images of one process."""

    digests: dict[int, str]  # of images that are there, by their numbers
    image_count: int = 0
    seconds: float = 0.0  # of sampling
    nfe: float = 0.0


def generate_missing_images(work: Sampling, sampler: Sampler, ranks: ProcessGroup) -> RankResult:
    """Generate this rank's missing images and hash its existing ones."""
    from distill.progress import bar

    conditions = work.conditions.values
    existing = {file.name for file in work.out.glob("*.png")}
    done = [i for i in range(len(conditions)) if folders.file_name(i) in existing]
    missing = sorted(set(range(len(conditions))) - set(done))
    ranks.wait()  # all have looked before anyone writes: the parts are disjoint
    part = slice(ranks.index, None, ranks.count)
    read = lambda i: folders.read_levels(work.out / folders.file_name(i))
    result = RankResult({i: folders.image_digest(read(i)) for i in done[part]})
    mine = missing[part]
    batch = work.batch or work.rows_per_call
    with bar(len(mine), "image", work.out.name, ranks.index == 0) as progress, torch.no_grad():
        if not missing and ranks.index == 0:  # killed before its manifest was written: a call counts its evaluations
            rows = work.rows_per_call
            sampler.make([image_generator(work.seed, 0)] * rows, list(conditions[:1]) * rows)
        for unit in (mine[k : k + batch] for k in range(0, len(mine), batch)):
            start = time.perf_counter()
            levels = _sample_images(work, sampler, unit)
            result.seconds += time.perf_counter() - start
            for i, image in zip(unit, levels, strict=True):
                folders.save_image(work.out, i, image)
                result.digests[i] = folders.image_digest(image)
            progress.update(len(unit))
    result.image_count = len(mine)
    result.nfe = sampler.nfe()
    return result


def _sample_images(work: Sampling, sampler: Sampler, numbers: list[int]) -> list[Tensor]:
    """The images of these numbers, uint8 [C, H, W] each. A call with fewer images repeats the last one."""
    conditions = work.conditions.values
    rows = work.rows_per_call
    size = work.plan.size if work.plan else None
    levels: list[Tensor] = []
    for pick in (numbers[k : k + rows] for k in range(0, len(numbers), rows)):
        padded = pick + [pick[-1]] * (rows - len(pick))
        images = sampler.make([image_generator(work.seed, i) for i in padded], [conditions[i] for i in padded])
        levels += _levels(images[: len(pick)], pick, size, work.frame)
    return levels


def _levels(images: Tensor, numbers: list[int], size: int | None, frame: int | None) -> list[Tensor]:
    """Images in [-1, 1] as uint8 [C, H, W] each; of a video, frame `frame`. ValueError for NaN and for another size."""
    if images.ndim == 5:
        if frame is None or not 0 <= frame < images.shape[2]:
            raise ValueError(
                f"this pipeline makes videos of {images.shape[2]} pictures, and frame is {frame}: "
                f"choose the one to keep, --frame 0 to {images.shape[2] - 1}"
            )
        images = images[:, :, frame]
    if size is not None and images.shape[-2:] != (size, size):
        pixels = " x ".join(map(str, images.shape[:-3:-1]))
        raise ValueError(f"the protocol is of {size} x {size} pixels, and these images are {pixels}: try --resolution")
    finite = torch.isfinite(images.flatten(1)).all(1)
    if not finite.all():
        bad = numbers[int((~finite).nonzero()[0])]
        raise ValueError(f"image {bad} holds NaN or infinite values; it was not written. Try another --dtype")
    return list(folders.quantize(images.cpu()))


def prepare_output_folder(out: Path, request: Manifest, conditions: SampleConditions, overwrite: bool) -> None:
    """Write the manifest and the prompts of a request to `out`. A folder of this request keeps its images."""
    old = folders.read_manifest(out, unfinished=True) if out.is_dir() else {}
    if old.get("request") is not None and {**old["request"], "model": request["model"]} == request:
        for leftover in out.glob(".*.partial"):
            leftover.unlink()
        if old.get("model") != request["model"]:  # the same images under another name
            folders.write_manifest(out, {**old, "model": request["model"], "request": request})
        return
    if old.get("request") is not None and not overwrite:
        was = old["request"]
        asks = {**dict.fromkeys(old["request"]), **request}
        differ = [f"{k} {was.get(k)!r}, not {v!r}" for k, v in asks.items() if was.get(k) != v]
        raise ValueError(
            f"{out} is not empty: it holds images of another run ({'; '.join(differ)}); choose another folder, or "
            "pass --overwrite"
        )
    folders.check_free(out, overwrite)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        if conditions.prompts:
            lines = ({"file_name": folders.file_name(i), "text": text} for i, text in enumerate(conditions.values))
            (out / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        labels = None if conditions.prompts else conditions.values
        folders.write_manifest(out, {"complete": False, **request, "labels": labels, "request": request})
    except OSError:
        remove_empty_output(out)
        raise


def remove_empty_output(out: Path) -> None:
    """Delete the manifest and the prompts if no image was written, so a failed request leaves no folder behind."""
    if not any(out.glob("*.png")):
        for name in (folders.MANIFEST, "metadata.jsonl"):
            (out / name).unlink(missing_ok=True)
        with suppress(OSError):  # something else lies in it
            out.rmdir()


def _finish(out: Path, manifest: Manifest, facts: Manifest, shares: list[RankResult]) -> None:
    """Write the manifest of the complete folder. ValueError if other images lie in it."""
    digests = {i: digest for share in shares for i, digest in share.digests.items()}
    assert len(digests) == sum(len(share.digests) for share in shares) == manifest["n"], "an image is missing, or twice"
    names = sorted(file.name for file in out.glob("*.png"))
    if names != [folders.file_name(i) for i in range(manifest["n"])]:
        raise ValueError(f"{out} holds images that are not of this run; remove them, or choose another folder")
    shape = list(folders.read_levels(out / names[0]).shape)
    image_facts = {
        "shape": shape,
        "size": shape[-1],
        "hash": folders.combine_digests(digests[i] for i in range(manifest["n"])),
    }
    folders.write_manifest(out, {**manifest, **facts, **image_facts, "complete": True})


def generate_images(work: Sampling) -> Manifest:
    """Generate the missing images and return the manifest. ValueError if another command writes to the folder."""
    work.validate()
    with folder_lock(work.out, "--out", beside=True):
        return _complete_folder(work)


def _complete_folder(work: Sampling) -> Manifest:
    """The manifest of a folder that no other process writes."""
    conditions = work.conditions
    ranks = ProcessGroup()
    if ranks.index == 0:
        prepare_output_folder(work.out, work.request(), conditions, work.overwrite)
        _update_protocol(work.out, work.protocol)
    ranks.wait()
    manifest = folders.read_manifest(work.out, unfinished=True)
    if manifest["complete"] and work.cost is None:
        return manifest
    from pipelines.launch import silence_libraries

    silence_libraries()
    device = ranks.device(work.device)
    try:
        sampler = work.sampler(device)
        share = None if manifest["complete"] else generate_missing_images(work, sampler, ranks)
    except Exception:
        if ranks.index == 0:
            remove_empty_output(work.out)
        raise
    if share is not None:
        shares = ranks.gather(share)
        if ranks.index == 0:
            _finish(work.out, manifest, _run_facts(work, sampler, shares, device), shares)
    if ranks.index == 0 and work.cost is not None:
        write_json(work.cost, _measure_image(work, sampler, device))
    ranks.wait()
    return folders.read_manifest(work.out)


def _update_protocol(out: Path, protocol: str | None) -> None:
    """Name the protocol of a complete folder as it is named now: its file may have moved."""
    manifest = folders.read_manifest(out, unfinished=True)
    if manifest["complete"] and manifest.get("protocol") != protocol:
        folders.write_manifest(out, {**manifest, "protocol": protocol})


def _run_facts(work: Sampling, sampler: Sampler, shares: list[RankResult], device: torch.device) -> Manifest:
    """What the manifest holds beside the request."""
    seconds = max(share.seconds for share in shares)
    kind = "pipeline" if work.method == "pipeline" else "teacher"
    return {
        "kind": work.kind or ("lora" if work.lora else kind),
        "student": work.student or work.lora is not None,
        **sampler.facts,
        "nfe": as_int_if_integral(max(share.nfe for share in shares)),
        "protocol": work.protocol,
        "commit": git_commit(),
        "hardware": hardware(device),
        "processes": len(shares),
        "seconds": round(seconds, 3),
        "images_per_second": round(sum(share.image_count for share in shares) / max(seconds, 1e-9), 3),
    }


def _measure_image(work: Sampling, sampler: Sampler, device: torch.device) -> dict[str, float | str]:
    """The cost of an image, with its network evaluations and the parameters."""
    conditions = work.conditions.values

    def make(k: int) -> Tensor:
        return sampler.make(
            [image_generator(work.seed, i) for i in range(k)], [conditions[i % len(conditions)] for i in range(k)]
        )

    with torch.no_grad():
        measured = measure_cost(make, work.batch or work.rows_per_call, device=device)
    return measured | {"nfe": as_int_if_integral(sampler.nfe()), "parameters": sampler.facts["parameters"]}


def as_int_if_integral(value: float) -> int | float:
    return int(value) if value == int(value) else round(value, 3)


def main() -> None:
    """Command line of `Sampling`."""
    from eval.cli import run

    def stage(sampling: Sampling) -> Manifest:
        return generate_images(sampling)

    stage.__doc__ = Sampling.__doc__
    manifest = run(stage)
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{manifest['n']} images of {manifest['model']}, {manifest['nfe']} network evaluation(s) each, "
            f"{manifest['images_per_second']} images/s"
        )
