"""A pipeline's folder -> a folder of images. The noise of image i depends on (seed, i) alone.

python -m eval.generate --model runs/teacher --n 2000 --steps 18 --out runs/samples/teacher-18
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval import images as folders

Solver = Literal["heun", "ddim"]
CLASSES = 10  # label of image i: i % CLASSES


def generator(seed: int, i: int) -> torch.Generator:
    """The source of all randomness of image i: a function of (seed, i) alone."""
    state = np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


class Sampler(NamedTuple):
    """How a model makes images: `make(generators, labels [B]) -> [B, C, H, W] in [-1, 1]`, at `nfe` calls each."""

    make: Callable[[list[torch.Generator], Tensor], Tensor]
    nfe: int


def teacher_sampler(teacher: Any, steps: int = 18, solver: Solver = "heun", guidance: float = 1.0) -> Sampler:
    """Samples a `pipelines.Teacher` along its probability-flow ODE.

    nfe counts network evaluations per image: twice the solver's calls under guidance (other than 0 and 1).
    """
    from distill.guidance import Guided
    from distill.solver import calls, sample

    denoiser = teacher.denoiser if guidance == 1 else Guided(teacher.denoiser, guidance)

    def make(generators: list[torch.Generator], labels: Tensor) -> Tensor:
        z = torch.cat([torch.randn((1, *teacher.shape), generator=g) for g in generators])
        return teacher.decode(sample(denoiser, z, teacher.encode(labels), steps=steps, solver=solver))

    return Sampler(make, calls(solver, steps) * (1 if guidance in (0, 1) else 2))


def student_sampler(pipe: Any, steps: int | None = None, timesteps: list[int] | None = None) -> Sampler:
    """Samples a diffusers ConsistencyModelPipeline; its first noise of image i is that of the teacher's image i.

    timesteps: the student's own, of which the first `steps` are used (by default all); None: `steps` equal ones.
    """
    steps = steps or len(timesteps or [0])
    if timesteps is not None and steps > len(timesteps):
        raise ValueError(f"steps is {steps}, but this student was made for {len(timesteps)}; use 1 to {len(timesteps)}")
    pipe.set_progress_bar_config(disable=True)
    how: dict[str, Any] = {"num_inference_steps": steps}
    if timesteps is not None:
        how = {"num_inference_steps": None, "timesteps": timesteps[:steps]}

    def make(generators: list[torch.Generator], labels: Tensor) -> Tensor:
        # pt and np are the same numbers; a list of generators draws each image's noise from its own
        made = pipe(batch_size=len(labels), class_labels=labels, generator=generators, output_type="pt", **how)
        return made.images.cpu() * 2 - 1

    return Sampler(make, steps)


def run(sampler: Sampler, n: int, seed: int = 0, batch: int = 250, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Images [n, C, H, W] and their labels i % classes, in batches, with a progress bar."""
    from tqdm import tqdm

    labels, made = torch.arange(n) % classes, []
    with tqdm(total=n, unit="image", desc=f"{sampler.nfe} calls each", leave=False) as bar, torch.no_grad():
        for pick in torch.arange(n).split(batch):
            made.append(sampler.make([generator(seed, int(i)) for i in pick], labels[pick]))
            bar.update(len(pick))
    return torch.cat(made), labels


def describe(model: Path) -> dict[str, Any]:
    """The distill.json of an exported folder; {} for a teacher. ValueError where there is no model."""
    if not model.is_dir():
        raise ValueError(f"there is no model folder {model}; train or export one first")
    path = model / "distill.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); export the model again") from None


def model_hash(model: Path) -> str:
    """The first 16 hex digits of the SHA-256 of a folder's weights and configuration."""
    total = hashlib.sha256()
    for file in sorted(f for f in model.rglob("*") if f.suffix in (".safetensors", ".json")):
        with file.open("rb") as stream:
            total.update(f"{file.relative_to(model)}".encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def generate(
    model: Path,
    out: Path,
    n: int = 2000,
    steps: int | None = None,
    solver: Solver = "heun",
    guidance: float = 1.0,
    seed: int = 0,
    batch: int = 250,
    name: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Sample a teacher or an exported student (a folder whose distill.json says "student": true) to a folder.

    The same request again is answered by the folder that is there; a different one needs `overwrite`.

    Args:
        model: the pipeline's folder.
        out: where the images and their manifest.json go.
        n: number of images; the label of image i is i % 10.
        steps: of the solver (a teacher's default: 18), or of the student (default: all that it has).
        solver: of the teacher's ODE; heun costs 2 steps - 1 calls, ddim costs steps.
        guidance: classifier-free guidance of the teacher; 1 is none, other values double the calls.
        seed: of the noise.
        batch: images per network call; it changes the speed, not the noise (pixels move by rounding at most).
        name: what tables call the model; by default its folder's name.
        overwrite: replace images that are there.
    """
    model, out = Path(model), Path(out)
    for what, value in (("n", n), ("batch", batch), ("steps", 1 if steps is None else steps)):
        if value < 1:
            raise ValueError(f"{what} is {value}; it must be at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    about = describe(model)
    student = bool(about.get("student"))
    if student and guidance != 1:
        raise ValueError(f"guidance is {guidance}, but {model} is a student, which has its guidance built in; use 1")
    has = about.get("steps")
    if student and steps and has and steps > has:
        raise ValueError(f"steps is {steps}, but {model} was made for {has}; use 1 to {has}")
    steps = steps or (has if student else 18)
    request = {
        "name": name or model.name,
        "model_hash": model_hash(model),
        "student": student,
        "steps": steps,
        "solver": None if student else solver,
        "guidance": None if student else guidance,
        "seed": seed,
    }
    old = folders.manifest_of(out) if out.is_dir() else {}
    if old and not overwrite and all(old.get(k) == v for k, v in (request | {"n": n}).items()):
        return old
    folders.check_free(out, overwrite)
    sampler = _sampler(model, about, steps, solver, guidance)
    start = time.perf_counter()
    images, labels = run(sampler, n, seed, batch)
    seconds = time.perf_counter() - start
    speed = {"seconds": round(seconds, 3), "images_per_second": round(n / seconds, 2), "batch": batch}
    speed["threads"] = torch.get_num_threads()
    return folders.write(out, images, labels, overwrite, **request, nfe=sampler.nfe, **speed)


def _sampler(model: Path, about: dict[str, Any], steps: int | None, solver: Solver, guidance: float) -> Sampler:
    if not about.get("student"):
        from pipelines import load

        return teacher_sampler(load(model), steps or 18, solver, guidance)
    from diffusers import DiffusionPipeline

    return student_sampler(
        DiffusionPipeline.from_pretrained(model, local_files_only=True), steps, about.get("timesteps")
    )


def main() -> None:
    """Command line of `generate`."""
    from eval.cli import run

    manifest = run(generate)
    print(
        f"{manifest['n']} images of {manifest['name']}, {manifest['nfe']} network evaluation(s) each, "
        f"{manifest['images_per_second']} images/s"
    )


if __name__ == "__main__":
    main()
