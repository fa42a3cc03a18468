"""Every recipe and every row of the digits as a smoke run, end to end.

Train, checkpoint, resume, export, reload by plain diffusers, sample.
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from programs import on_cpu
from recipe_runs import (
    COMPARED,
    QUICK,
    RECIPES,
    RUNS,
    STUDENTS,
    Recorder,
    argv,
    config_of,
    marked,
    noise,
    resumed,
    sampled,
    trained,
)
from safetensors.torch import load_file

from distill.configuration import parse
from distill.training import checkpoint
from pipelines import load, run
from pipelines.export import export, verify
from pipelines.export.card import python_block


def test_images_keep_their_proportions():
    """Only DMD2's authors resize the full image to a square."""
    squeezed = {name for name in RECIPES if getattr(config_of(name).data, "squeeze", False)}
    assert squeezed == {"dmd2_sd15", "dmd2_sdxl", "dmd2_sdxl_lora"}


# ---- what a run leaves ----


@pytest.mark.parametrize("name", marked(RUNS, QUICK))
def test_files(name, out):
    """The configuration, the log, grids of samples, checkpoints, the pipeline; nothing half-made."""
    folder = out(name)
    names = {
        "config.yaml",
        "history.jsonl",
        "log.jsonl",
        "samples",
        "checkpoint-1",
        "checkpoint-2",
        "pipeline",
        "teacher",
    }
    assert {p.name for p in folder.iterdir()} - {"data"} == names
    recipe, flags = RUNS[name][0], argv(name, folder)
    config = run.smoke_config(parse(config_of(recipe), flags))
    assert parse(config_of(recipe), ["--config", f"{folder / 'config.yaml'}"]) == config
    lines = [json.loads(line) for line in (folder / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert all("student/loss" in line for line in lines)
    grids = {p.name for p in (folder / "samples").iterdir() if p.suffix != ".gif"}
    assert grids == {f"step-00000{i}.png" for i in range(3)} | {"references.safetensors"}
    with Image.open(folder / "samples" / "step-000002.png") as picture:
        assert np.asarray(picture).std() > 5
    facts = json.loads((folder / "pipeline" / "distill.json").read_text())
    assert facts["student"] and facts["steps"] == len(facts["times"]) == config.student.steps
    assert facts["config"] == (folder / "config.yaml").read_text()


@pytest.mark.parametrize("name", marked(RUNS, QUICK))
def test_the_rest_is_the_teachers(name, out):
    """Text encoders, tokenizers and VAE are the teacher's files, byte for byte."""
    folder = out(name)
    ours = ("unet", "transformer", "scheduler")
    parts = [p.name for p in (folder / "teacher").iterdir() if p.is_dir() and p.name not in ours]
    for part in parts:
        for file in (folder / "teacher" / part).rglob("*"):
            assert (
                not file.is_file()
                or file.read_bytes() == (folder / "pipeline" / file.relative_to(folder / "teacher")).read_bytes()
            )


PLAIN = """
import importlib, sys
for room in ("distill", "pipelines", "eval", "recipes"):
    sys.modules[room] = None  # to import it is an error
import json, numpy, torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
logging.disable_progress_bar(), logging.set_verbosity_error()
torch.set_num_threads(1)
for line in sys.stdin:
    folder, base, lora, given, programs, to = json.loads(line)
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    args, options = torch.load(given, weights_only=True)
    def made(pipe):
        torch.manual_seed(5)
        done = pipe(*args, **options)
        images = done.images if hasattr(done, "images") else done.frames
        return numpy.asarray(images)
    images = {"pipeline": made(pipe)}
    if lora:
        on_base = DiffusionPipeline.from_pretrained(base, scheduler=pipe.scheduler, local_files_only=True)
        on_base.set_progress_bar_config(disable=True)
        on_base.load_lora_weights(folder, weight_name=lora)
        images["lora"] = made(on_base)
    for program in programs:
        space = {}
        exec(program, space)
        assert space.get("image", space.get("video")) is not None
    numpy.savez(to, **images)
    print("made", flush=True)
"""


@pytest.fixture(scope="module")
def plainly(out, tmp_path_factory):
    """plainly(run) -> {"pipeline" | "lora": images} by diffusers, transformers and peft alone; the card's programs run.

    One process makes the images of all runs, line by line.
    """
    from diffusers import DiffusionPipeline

    where = tmp_path_factory.mktemp("plainly")
    with (where / "said.txt").open("w") as said:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
        process = subprocess.Popen([sys.executable, "-c", PLAIN], cwd=where, text=True, **pipes)

    def images(name):
        folder = out(name)
        teacher, pipeline = load(folder / "teacher"), folder / "pipeline"
        family, facts = teacher.family, json.loads((pipeline / "distill.json").read_text())
        pipe = Recorder(DiffusionPipeline.from_pretrained(pipeline, local_files_only=True))
        pipe.pipe.set_progress_bar_config(disable=True)
        prompt = teacher.family.examples(teacher)[1]
        family.sample(pipe, [prompt], noise(teacher), facts["steps"], family.no_guidance)
        torch.save(pipe.called, where / f"{name}.pt")
        lora = [p.name for p in pipeline.glob("*_lora.safetensors")]
        card = (pipeline / "README.md").read_text()
        folders = {re.sub(r"[^\w.-]+", "-", folder.name): pipeline, "teacher": folder / "teacher"}
        programs = [on_cpu(python_block(card, i), folders) for i in range(card.count("```python"))]
        job = (
            f"{pipeline}",
            f"{folder / 'teacher'}",
            *(lora or [""]),
            f"{where / name}.pt",
            programs,
            f"{where / name}.npz",
        )
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        assert "made\n" in iter(process.stdout.readline, ""), (where / "said.txt").read_text()[-3000:]
        return dict(np.load(where / f"{name}.npz"))

    yield images
    process.communicate()


def placed(images, like):
    """As [1, C, (T,) H, W] in [0, 1], whatever the pipeline's layout is."""
    if images.shape == like.shape:
        return images
    return np.moveaxis(images, -1, 1) if images.ndim == 4 else np.swapaxes(images, 1, 2)


@pytest.mark.parametrize("name", marked(RUNS, COMPARED))
def test_pipeline_is_the_averaged_student(name, out, plainly):
    """Under diffusers alone it samples the images of our student with its average; other weights give others."""
    teacher, state = trained(name, out(name))
    student, net = state.nets.student, state.ema.net
    own = sampled(teacher, student, net)
    for what, images in plainly(name).items():
        assert np.abs(placed(images, own) - own).max() < (1e-4 if what == "pipeline" else verify.LARGEST)
        others = [student.denoiser.net] + [teacher.denoiser.net] * (not hasattr(net, "end"))  # the teacher knows no end
        for other in others:
            assert np.abs(placed(images, own) - sampled(teacher, student, other)).max() > 10 * verify.TOLERANCE


@pytest.mark.parametrize("name", marked(STUDENTS, COMPARED))
def test_resumes(name, out, tmp_path):
    """From its first checkpoint it ends bit for bit where it ended."""
    folder = out(name)
    _, state = resumed(name, folder, folder / "checkpoint-1")
    assert state.step == 2
    again = checkpoint.save(state, tmp_path)
    for file in (folder / "checkpoint-2").glob("*.safetensors"):
        mine, theirs = load_file(again / file.name), load_file(file)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine), file.name


def test_adapters_are_merged(out):
    """The exported weights have the backbone's names, and hold the adapters."""
    teacher = load(out("adapters") / "teacher")
    (file,) = (out("adapters") / "pipeline" / "unet").glob("*.safetensors")
    stored, backbone = load_file(file), teacher.denoiser.net.state_dict()
    assert stored.keys() == backbone.keys()
    changed = {name for name in stored if not torch.equal(stored[name], backbone[name])}
    adapted = {name for name in stored if name.split(".")[-2] in ("conv1", "conv2", "time_emb_proj")}
    assert changed == {name for name in adapted if name.endswith("weight")}


def test_times(out):
    """DMD2's four steps, its one step at 399, SiD-LSG's at 625, LCM's training grid: the scheduler's own timesteps."""
    from diffusers import DiffusionPipeline

    told = {"dmd2_sdxl": [999, 749, 499, 249], "one step": [399], "sid_sd15": [625], "swiftbrush_sd21": [999]}
    grid = [999, 759, 499, 259]
    told |= {"lcm_lora_sdxl": grid, "tcd_sdxl": grid, "pcm_sdxl": [999, 749, 499, 249]}
    for name, wanted in told.items():
        scheduler = DiffusionPipeline.from_pretrained(out(name) / "pipeline", local_files_only=True).scheduler
        scheduler.set_timesteps(len(wanted))
        assert scheduler.timesteps.tolist() == wanted
    again = export.load_student_of_run(export.ExportArguments(run=f"{out('lcm_lora_sdxl')}"))[0]
    assert [round(999 * t) for t in again.times] == grid  # its config.yaml names no times
