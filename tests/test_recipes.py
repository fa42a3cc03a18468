"""Every recipe as a smoke run: its files, and its pipeline under plain diffusers in a process without this project."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from distill import checkpoint
from distill.config import parse
from distill.data import Digits
from distill.roles import build
from distill.trainer import train
from pipelines import ExportError, edm, index, load, run
from pipelines import export as exporting

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(p.stem.removesuffix("_digits") for p in (ROOT / "recipes").glob("*_digits.py"))
ADAPTERS = "--student.lora.rank 2 --student.lora.targets conv1 conv2 time_emb_proj"
RUNS = {name: (name, "") for name in RECIPES} | {
    "two steps": ("sid", "--student.steps 2"),
    "adapters": ("dmd2", ADAPTERS),
    "adapters on both": ("vsd", f"{ADAPTERS} --fake.lora.rank 2 --fake.lora.targets conv1"),
}
EVERY = {"dmd2": "--method.every 1", "sid": "--method.fake_steps 1", "vsd": "--method.fake_steps 1"}
# two steps that move the student, and an average that is neither the student nor the teacher
FAST = "--smoke --learning_rate 1e-2 --lr_warmup_steps 0 --ema_half_life 16 --ema_ramp None --checkpointing_steps 2"
B = 6


def module(name):
    return importlib.import_module(f"recipes.{name}_digits")


def argv(name, out):
    recipe, flags = RUNS[name]
    return recipe, [*FAST.split(), *EVERY.get(recipe, "").split(), *flags.split(), "--output_dir", f"{out}"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """out(run) -> the folder of a finished smoke run, made once."""
    done = {}

    def make(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            recipe, flags = argv(name, folder)
            module(recipe).main(module(recipe).CONFIG, flags)
            done[name] = folder
        return done[name]

    return make


def finished(name, folder):
    """(teacher, state) of a finished run, from its checkpoint and not from its pipeline."""
    recipe, flags = argv(name, folder)
    config = run.smoke(parse(module(recipe).CONFIG, flags))
    torch.manual_seed(config.train.seed)
    teacher = run.tiny()
    student = config.student
    if student.times is None:
        student = run.dataclasses.replace(student, times=teacher.times(student.steps, student.sigma))
    nets = build(config.method, teacher.denoiser, teacher.shape, teacher.encode([0]), student, config.fake)
    resume = checkpoint.found(folder)[-1]
    (state,) = train(config.method, nets, Digits(), config.train, Accelerator(cpu=True), resume)
    return teacher, state


class Generated:
    """Noise in the order in which a pipeline draws it."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, name, shape):
        return torch.randn(shape, generator=self.generator)


@torch.no_grad()
def sampled(teacher, student, net):
    """Images [B, H, W, C] in [0, 1] of the student with these weights."""
    noise, labels = Generated(), torch.arange(B)
    z = noise.normal("z", (B, *teacher.shape))
    x = student.using(net).generate(z, teacher.encode(labels), noise)
    return (teacher.decode(x) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


# ---- what a run leaves ----


@pytest.mark.parametrize("name", RUNS)
def test_files(name, out):
    """The configuration, the log, grids of samples, a checkpoint, the pipeline; nothing half-made."""
    folder = out(name)
    names = {"config.yaml", "log.jsonl", "samples", "checkpoint-2", "pipeline"}
    assert {p.name for p in folder.iterdir()} == names
    recipe, flags = argv(name, folder)
    config = run.smoke(parse(module(recipe).CONFIG, flags))
    assert parse(module(recipe).CONFIG, ["--config", f"{folder / 'config.yaml'}"]) == config
    lines = [json.loads(line) for line in (folder / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert all("student/loss" in line for line in lines)
    assert {p.name for p in (folder / "samples").iterdir()} == {"step-000001.png", "step-000002.png"}
    with Image.open(folder / "samples" / "step-000002.png") as picture:
        assert (picture.mode, picture.size) == ("L", (10 * 32, 4 * 32))
        assert np.asarray(picture).std() > 5


@pytest.mark.parametrize("name", RUNS)
def test_pipeline_says_what_it_is(name, out):
    facts = json.loads((out(name) / "pipeline" / "distill.json").read_text())
    assert facts["student"] and facts["steps"] == len(facts["times"])
    assert facts["config"] == (out(name) / "config.yaml").read_text()


PLAIN = """
import sys
for room in ("distill", "pipelines", "eval", "recipes", "peft"):
    sys.modules[room] = None  # to import it is an error
import json, numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for folder, steps, to in json.load(sys.stdin):
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    labels, generator = torch.arange(6), torch.Generator().manual_seed(0)
    steps = dict(num_inference_steps=steps)
    images = pipe(6, class_labels=labels, generator=generator, output_type="np", **steps).images
    numpy.save(to, images)
"""


@pytest.fixture(scope="module")
def plainly(out, tmp_path_factory):
    """{run: images of its pipeline, by diffusers alone}: one process for all."""
    folder, jobs = tmp_path_factory.mktemp("plainly"), []
    for name in RUNS:
        pipeline = out(name) / "pipeline"
        steps = json.loads((pipeline / "distill.json").read_text())["steps"]
        jobs.append((f"{pipeline}", steps, f"{folder / name}.npy"))
    command = [sys.executable, "-c", PLAIN]
    done = subprocess.run(command, cwd=folder, input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: np.load(folder / f"{name}.npy") for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_pipeline_is_the_averaged_student(name, out, plainly):
    """Under diffusers alone it samples the images of our student with its average; other weights give others."""
    teacher, state = finished(name, out(name))
    student, net = state.nets.student, state.ema.net
    assert np.abs(plainly[name] - sampled(teacher, student, net)).max() < 1e-5
    for other in (student.denoiser.net, teacher.denoiser.net):
        assert np.abs(plainly[name] - sampled(teacher, student, other)).max() > 10 * exporting.TOLERANCE
    assert len(student.times) == (2 if name in ("lcd", "two steps") else 1)


def test_adapters_are_merged(out):
    """The exported weights have the backbone's names, and hold the adapters."""
    teacher, _ = finished("adapters", out("adapters"))
    (file,) = (out("adapters") / "pipeline" / "unet").glob("*.safetensors")
    stored, backbone = load_file(file), teacher.denoiser.net.state_dict()
    assert stored.keys() == backbone.keys()
    changed = {name for name in stored if not torch.equal(stored[name], backbone[name])}
    adapted = {name for name in stored if name.split(".")[-2] in ("conv1", "conv2", "time_emb_proj")}
    assert changed == {name for name in adapted if name.endswith("weight")}


# ---- an export that is wrong is caught ----


@pytest.fixture
def trained(out):
    teacher, state = finished("sid", out("sid"))
    wrong = {"teacher": teacher.denoiser.net, "raw": state.nets.student.denoiser.net}
    return teacher, state.nets.student, state.ema.net, wrong


@pytest.mark.parametrize("which", ("teacher", "raw"))
def test_wrong_weights_are_caught(which, trained, tmp_path, monkeypatch):
    """The folder of an earlier export stays as it is."""
    teacher, student, net, wrong = trained
    folder, right = tmp_path / "pipeline", edm.export
    assert exporting.export(student, teacher, net, folder, "") < 1e-5
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    monkeypatch.setattr(edm, "export", lambda student, teacher, net: right(student, teacher, wrong[which]))
    with pytest.raises(ExportError, match="differs from the student by"):
        exporting.export(student, teacher, net, folder, "")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.parametrize("change", ({"sigma_data": 0.6}, {"sigma_max": 2.6}), ids=str)
def test_a_wrong_scheduler_is_caught(change, trained, tmp_path):
    teacher, student, net, _ = trained
    exporting.export(student, teacher, net, tmp_path / "pipeline", "")
    file = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert exporting.verify(student, teacher, net, tmp_path / "pipeline") > exporting.TOLERANCE


def test_a_recipe_fails_with_its_export(tmp_path, monkeypatch, capsys):
    right = edm.export
    calls = []

    def late(student, teacher, net):
        """Right when it is asked before the training, wrong after it."""
        calls.append(net)
        return right(student, teacher, calls[0])

    monkeypatch.setattr(edm, "export", late)
    with pytest.raises(SystemExit) as error:
        module("sid").main(module("sid").CONFIG, argv("sid", tmp_path)[1])
    assert error.value.code == 2 and len(calls) == 2
    assert "error: the exported pipeline differs from the student" in capsys.readouterr().err
    assert not (tmp_path / "pipeline").exists()


# ---- trackers ----


def test_tensorboard_gets_numbers_and_images(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module("sid").main(module("sid").CONFIG, [*argv("sid", tmp_path)[1], "--report_to", "tensorboard"])
    (events,) = tmp_path.rglob("events.out.*")
    found = EventAccumulator(f"{events}").Reload()
    logged = [json.loads(line)["student/loss"] for line in (tmp_path / "log.jsonl").open()]
    assert [e.value for e in found.Scalars("student/loss")] == pytest.approx(logged)
    assert [e.step for e in found.Images("samples")] == [1, 2]


def test_wandb_offline_gets_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    module("sid").main(module("sid").CONFIG, [*argv("sid", folder)[1], "--report_to", "wandb"])
    assert len(list(folder.rglob("offline-run-*/files/media/images/samples_*.png"))) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"run"}  # nothing beside the run's folder


# ---- the teacher and the demo ----


def test_a_teacher_and_its_student(tmp_path):
    """The teacher's folder is read back as a guidable denoiser, smooth in time, and is never overwritten."""
    from recipes import digits_teacher

    config = digits_teacher.Teacher(output_dir=f"{tmp_path / 't'}", max_train_steps=3, channels=(8, 16))
    digits_teacher.main(config)
    with pytest.raises(SystemExit):
        digits_teacher.main(config)
    assert index(tmp_path / "t")["_class_name"] == "ConsistencyModelPipeline"
    teacher = load(tmp_path / "t")
    assert (teacher.denoiser.sigma_d, teacher.shape) == (0.75, (1, 8, 8))
    assert teacher.denoiser.null["class_labels"].tolist() == [10]
    weight = teacher.denoiser.net.time_embedding.linear_1.weight.clone()
    edm.smooth(teacher.denoiser.net, config.max_frequency)
    assert torch.equal(teacher.denoiser.net.time_embedding.linear_1.weight, weight) and (weight == 0).any()
    flags = f"--teacher {tmp_path / 't'} --output_dir {tmp_path / 's'} --method.guidance 2 --max_train_steps 1"
    module("vsd").main(module("vsd").CONFIG, flags.split())
    assert (tmp_path / "s" / "pipeline" / "model_index.json").is_file()


def test_the_demo_plans_every_recipe(tmp_path):
    """Each job waits only for jobs that exist; every student is sampled from its exported pipeline."""
    from recipes import digits_demo

    todo = digits_demo.jobs(digits_demo.Demo(methods=tuple(RECIPES)), tmp_path)
    assert all(set(job.after) <= todo.keys() for job in todo.values())
    for name in RECIPES:
        assert f"{tmp_path / name / 'pipeline'}" in todo[f"{name}-1"].command
        assert todo[f"{name}-1"].after == (name,)
