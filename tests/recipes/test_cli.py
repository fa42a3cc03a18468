"""The command line of `recipes.train`: help and mistakes at once, each mistake named; Ctrl-C leaves a run to resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.configuration import dump, parse
from distill.data import Digits
from distill.training import checkpoint
from recipes import train
from recipes.digits import TABLE

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--train_batch_size", "8", "--validation_steps", "0", "--lr_scheduler", "constant"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny random teacher on disk; with label=None one that was trained without label dropout."""
    from pipelines.families import tiny

    def save(null_class):
        folder = tmp_path_factory.mktemp("teacher")
        tiny.save("edm", folder)
        (folder / "distill.json").write_text(json.dumps({"null_class": null_class}))
        return f"{folder}"

    torch.manual_seed(0)
    return {"guidable": save(10), "plain": save(None)}


@pytest.fixture
def call(capsys):
    """call(method, flags) -> (exit status, what it said on stderr, in one line without frames), on the digits."""

    def call(name, *flags):
        status = 0
        try:
            train.main(["--method", name, "--teacher", "digits", *map(str, flags)])
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr().err
        return status, " ".join("".join(c if c.isascii() else " " for c in said).split())

    return call


# ---- before any work ----


def test_help_and_mistakes_are_light():
    """Neither --help nor a mistake waits for a library that takes seconds; --help names every flag's meaning."""
    script = """
import io, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
rows = [["train", "--method", name, "--teacher", "digits"] for name in ("dmd2", "sfd", "ect", "dmd")]
ours = ("--config", "--max_train_steps", "--method.", "--student.sigma", "iterations of the")
for name, *flags in [*rows, ["digits_teacher"], ["digits_demo"], ["pixel_teacher"]]:
    for more, status, words in (
        (["--help"], 0, ours if flags else ("--output_dir", "--seed")),
        (["--nope"], 2, ("--nope",)),
        (["--seed", "x"], 2, ("--seed", "'x'")),
        *([(["--teacher", "nothing"], 2, ("nothing", "model_index.json"))] if flags else []),
    ):
        said, sys.argv = io.StringIO(), [name, *flags, *more]
        with redirect_stdout(said), redirect_stderr(said):
            try:
                runpy.run_path(f"recipes/{name}.py", run_name="__main__")
            except SystemExit as error:
                assert error.code == status, (sys.argv, said.getvalue())
        assert all(word in said.getvalue() for word in words), (sys.argv, said.getvalue())
heavy = [m for m in ("diffusers", "transformers", "peft", "accelerate", "sklearn", "matplotlib") if m in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


MISTAKES = {  # flags: words of the message
    "--nope 3": "Unrecognized options: --nope",
    "--max_train_step 3": "Unrecognized options: --max_train_step",
    "--max_train_steps many": "--max_train_steps: invalid literal for int() with base 10: 'many'",
    "--learning_rate fast": "--learning_rate: could not convert string to float: 'fast'",
    "--report_to paper": "invalid choice 'paper' for argument '--report_to'",
    "--student.renoise old": "invalid choice 'old' for argument '--student.renoise'",
    "--max_train_steps 0": "max_train_steps is 0; it must be at least 1",
    "--train_batch_size -1": "train_batch_size is -1; it must be at least 1",
    "--learning_rate 0": "learning_rate is 0.0; it must be above 0",
    "--adam_beta2 1": "adam_beta2 is 1.0; it must be at least 0 and below 1",
    "--checkpoints_total_limit 0": "checkpoints_total_limit is 0; it must be at least 1 and",
    "--student.steps 0": "--student.steps is 0; it must be at least 1",
    "--student.sigma -2": "--student.sigma is -2.0; it must be above 0",
    "--student.times 0.5 0.7": "student times are (0.5, 0.7); they must fall",
    "--student.times 1 0.4 --student.steps 3": "student.steps is 3 and student.times are 2, (1.0, 0.4): pass",
    "--student.lora.rank 0": "--student.lora.rank is 0; it must be at least 1",
    "--config": "--config needs the path of a YAML file",
    "--config nowhere.yaml": "--config needs the path of a YAML file (as a run writes it to its config.yaml); got",
    "--config=nowhere.yaml": "--config needs the path of a YAML file",
    "--teacher": "--teacher",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_on_the_command_line(flags, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said = call("dmd2", *flags.split())
    assert status == 2 and MISTAKES[flags] in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, words",
    (
        ("nope: 3", "--nope"),
        ("student: {nope: 3}", "--student.nope"),
        ("method: {gan: much}", "--method.gan: could not convert string to float: 'much'"),
        ("train_batch_size: 0", "train_batch_size is 0"),
        ("- 3", "must hold names with values"),
        ("", "must hold names with values"),
        ("a: [", "is not YAML: while parsing"),
    ),
)
def test_mistakes_in_a_file(text, words, call, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    status, said = call("dmd2", "--config", tmp_path / "x.yaml")
    assert status == 2 and words in said and "Traceback" not in said


IMPOSSIBLE = {  # method and flags: words of the message
    "vsd --method.guidance 2": "VSD with these guidance values needs a null condition",
    "sid --method.kappa 1.5 1.5 1.5 1.5": "SiD with these guidance values needs a null condition",
    "dmd2 --train_batch_size 9 --gradient_accumulation_steps 2": "train_batch_size 9 is not divisible by 1 process",
    "dmd2 --teacher nowhere": "no pipeline at 'nowhere': a diffusers folder has a model_index.json",
    "dmd2 --method.taps neck": "the top-level modules are ['conv_in', 'time_proj'",
    "sid --fake.lora.rank 2": "to_q",  # peft's own: these targets are not in the network
    "sid --student.times 1 0.7 0.2 --student.sigma None": "--student.times 1 0.657843 0.2 (network inputs",
    "sid --student.times 1 0.4": "times begin at 1, and student.sigma or timestep puts the first call at 0.499322",
    "tcm --student.times 1 0.3 --student.sigma None": "TCM trains it from method.start = 1.0 on: pass --student.times",
    "sid --student.scale 1": "this family's scheduler scales its input by sigma",
    "sid --student.steps 2 --student.renoise ddim": "renoises with fresh noise: train with --student.renoise fresh",
    "sid --resume_from_checkpoint nowhere": "no checkpoint at 'nowhere'",
}


@pytest.mark.parametrize("line", IMPOSSIBLE)
def test_impossible_runs(line, call, teacher, tmp_path):
    """What fits the flags but not the teacher or the disk: one message, and no folder."""
    (name, *flags), out = line.split(), tmp_path / "run"
    status, said = call(name, "--teacher", teacher["plain"], "--output_dir", out, *flags)
    assert status == 2 and f"error: {said.partition('error: ')[2]}" == said
    assert IMPOSSIBLE[line] in said and not out.exists()


def test_another_pipeline_is_no_teacher(call, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    status, said = call("sid", "--teacher", tmp_path, "--output_dir", tmp_path / "run")
    assert status == 2 and "is a KandinskyPipeline; supported pipelines are" in said
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ConsistencyModelPipeline"}))
    status, said = call("sid", "--teacher", tmp_path, "--output_dir", tmp_path / "run")
    assert status == 2 and "its model_index.json names no scheduler" in said


def test_two_runs_in_one_folder(call, teacher, tmp_path):
    """The second is refused and touches nothing, unless it goes on with the first."""
    flags = ("--teacher", teacher["plain"], "--output_dir", tmp_path, *SHORT, "--checkpointing_steps", "2")
    assert call("sid", *flags, "--max_train_steps", 2)[0] == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    status, said = call("sid", *flags)
    assert status == 2 and f"{tmp_path} already holds a run: pass --resume_from_checkpoint latest" in said
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    status, said = call("sid", *flags, "--resume_from_checkpoint", tmp_path / "checkpoint-7")
    assert status == 2 and "no checkpoint at" in said and "holds ['checkpoint-2']" in said
    go_on = ("--resume_from_checkpoint", "latest", "--max_train_steps", 3, "--logging_steps", 1)
    assert call("sid", *flags, *go_on)[0] == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()] == [2, 3]


def test_latest_of_nothing_starts_afresh(call, teacher, tmp_path):
    """As the training scripts of diffusers do, and it says so."""
    flags = ("--teacher", teacher["plain"], "--output_dir", tmp_path, *SHORT, "--max_train_steps", 1)
    status, said = call("sid", *flags, "--resume_from_checkpoint", "latest")
    assert status == 0 and f"no checkpoint in {tmp_path}: starting afresh" in said


def test_a_renamed_checkpoint_and_a_finished_run(call, teacher, tmp_path):
    """A checkpoint may be moved; a run that had ended exports again."""
    flags = ("--teacher", teacher["plain"], *SHORT, "--max_train_steps", 2, "--checkpointing_steps", 2)
    assert call("sid", *flags, "--output_dir", tmp_path / "a")[0] == 0
    kept = (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "kept")
    assert call("sid", *flags, "--output_dir", tmp_path / "b", "--resume_from_checkpoint", kept)[0] == 0
    a, b = ((tmp_path / run / "pipeline" / "unet").glob("*.safetensors") for run in "ab")
    assert next(a).read_bytes() == next(b).read_bytes()


def test_a_run_that_diverges_says_where(call, teacher, tmp_path):
    flags = ("--teacher", teacher["plain"], "--output_dir", tmp_path, *SHORT, "--learning_rate", "1e30")
    status, said = call("sid", *flags)
    assert status == 2 and "non-finite loss at step" in said and "Lower the learning rate" in said


# ---- the configuration ----


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_configuration_reads_back(name, tmp_path):
    """config.yaml by --config is the run's configuration; flags go on top, wherever they stand."""
    default = TABLE[name].config
    flags = "--seed 5 --learning_rate 1e-6 --student.steps 2 --student.sigma None --no_smoke --report_to none"
    config = parse(default, [*flags.split(), "--fake.lora.targets", "conv1", "conv2", "--teacher", "a b/c"])
    assert (config.train.seed, config.student.sigma, config.fake.lora.targets) == (5, None, ("conv1", "conv2"))
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert parse(default, ["--config", f"{file}"]) == config
    for argv in (["--seed", "7", f"--config={file}"], ["--config", f"{file}", "--seed=7"]):
        changed = parse(default, argv)
        assert changed.train.seed == 7 and changed.train.learning_rate == 1e-6 and changed.method == config.method


@pytest.mark.parametrize(
    "name, flags",
    (
        ("vsd", "--method.guidance 0.5 4 --method.fake_guidance -0.25"),
        ("lcd", "--method.guidance 6 16 --method.huber_c None --method.solver ddim"),
        ("sid", "--method.kappa -1.5 -1e-05 0 1 --method.no_normalise --method.times.low 1e-3"),
        ("dmd2", "--method.taps mid_block conv_out --student.times 1 0.5 0.25"),
        ("scm", "--method.norm vector --max_grad_norm 0.1"),
    ),
)
def test_unusual_values_read_back(name, flags, tmp_path):
    """Ranges, None, negative and small numbers."""
    default = TABLE[name].config
    config = parse(default, flags.split())
    assert config != default
    (tmp_path / "config.yaml").write_text(dump(config))
    assert parse(default, ["--config", f"{tmp_path / 'config.yaml'}"]) == config


def test_every_flag_is_in_the_file():
    """... and the run's options are flat there, as on the command line."""
    config = TABLE["dmd2"].config
    tree = yaml.safe_load(dump(config))
    assert tree["max_train_steps"] == config.train.max_train_steps and "train" not in tree
    assert tree["method"]["times"] == {"low": 0.02, "high": 20.0, "rho": 7.0}


# ---- Ctrl-C ----


def final(folder):
    return load_file(checkpoint.list_intact_checkpoints(folder)[-1] / "student.safetensors")


@pytest.mark.parametrize("player", ("fake", "student"))
def test_ctrl_c_ends_the_step_and_resumes(player, call, teacher, tmp_path, monkeypatch):
    """Pressed within a step: the step is finished and saved; the resumed run equals the uninterrupted one."""
    flags = ("--teacher", teacher["plain"], *SHORT, "--max_train_steps", 5, "--checkpointing_steps", 5)
    assert call("sid", *flags, "--output_dir", tmp_path / "whole")[0] == 0

    right, handler = Digits.__call__, signal.getsignal(signal.SIGINT)

    def press(data, draw):
        if (draw.step, draw.player) == (2, player):
            signal.raise_signal(signal.SIGINT)
        return right(data, draw)

    with monkeypatch.context() as patch:
        patch.setattr(Digits, "__call__", press)
        status, said = call("sid", *flags, "--output_dir", tmp_path / "cut")
    assert status == 130 and signal.getsignal(signal.SIGINT) is handler
    folder = tmp_path / "cut" / "checkpoint-3"
    assert f"interrupted; saved {folder}. Go on with --resume_from_checkpoint latest" in said and folder.is_dir()
    assert call("sid", *flags, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest")[0] == 0
    one, other = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ctrl_c_twice_stops_at_once(call, teacher, tmp_path, monkeypatch):
    def press(data, draw):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Digits, "__call__", press)
    status, said = call("sid", "--teacher", teacher["plain"], "--output_dir", tmp_path, *SHORT)
    assert status == 130 and "interrupted: nothing of this step is saved" in said
    assert not checkpoint.list_intact_checkpoints(tmp_path)


def test_ctrl_c_in_the_terminal(call, teacher, tmp_path):
    """The signal itself, to a run by plain python."""
    flags = ["--teacher", teacher["plain"], "--output_dir", f"{tmp_path}", *SHORT, "--logging_steps", "1"]
    command = [sys.executable, "recipes/train.py", "--method", "sid", *flags, "--max_train_steps", "100000"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        deadline, log = time.monotonic() + 120, tmp_path / "log.jsonl"
        while process.poll() is None and not (log.is_file() and log.read_text().count("\n") > 2):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    (folder,) = checkpoint.list_intact_checkpoints(tmp_path)
    assert process.returncode == 130 and f"saved {folder}" in said and "Traceback" not in said
    steps = checkpoint.read_step(folder)
    go_on = ("--resume_from_checkpoint", "latest", "--max_train_steps", steps + 2)
    assert call("sid", *flags, *go_on)[0] == 0
    logged = [json.loads(line)["step"] for line in log.open()]
    assert logged == list(range(1, steps + 3))
