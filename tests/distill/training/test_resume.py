"""A run goes on as the run that it was: what may not change is refused, what may is printed and kept; one at a time."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from distill import history
from distill.files import folder_lock, read_yaml
from distill.training.config import TrainConfig
from distill.training.log import Log
from distill.training.trackers import start_trackers
from pipelines.families import tiny
from pipelines.identity import identity
from pipelines.run import main
from recipes.digits import TABLE

ROOT = Path(__file__).resolve().parents[3]
SHORT = "--train_batch_size 8 --validation_steps 0 --lr_scheduler constant --checkpointing_steps 2".split()
LATEST = ("--resume_from_checkpoint", "latest")


def edited(teacher, folder, scale):
    """A copy of a teacher; one tensor of its network is scaled."""
    shutil.copytree(teacher, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.weight"] *= scale
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    tiny.save("edm", folder)
    return folder


@pytest.fixture
def call(capsys):
    """call(method, flags) -> (exit status, what stderr said)."""

    def call(name, *flags):
        status = 0
        try:
            main(TABLE[name].config, [str(flag) for flag in flags])
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def run(call, teacher, tmp_path):
    """A finished run of two steps, and its flags."""
    flags = ("--teacher", teacher, "--output_dir", tmp_path / "run", *SHORT)
    assert call("sid", *flags, "--max_train_steps", 2)[0] == 0
    return tmp_path / "run", flags


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_would_make_it_another_run_is_refused(run, call, teacher, tmp_path):
    """Each kind by its name, with the value of then and of now; nothing of the run is touched, then it goes on."""
    folder, flags = run
    before = contents(folder)
    other = edited(teacher, tmp_path / "other", 1.01)
    refused = {
        ("--seed", 1): ("seed 0, not 1:", "seed"),
        ("--train_batch_size", 16): ("train_batch_size 8, not 16:", "batch"),
        ("--student.sigma", 3): ("student.sigma 2.5, not 3.0:", "times"),
        ("--teacher", other): (f"another teacher ({teacher}; other: unet)", "teacher"),
        ("--seed", 1, "--train_batch_size", 4): ("seed 0, not 1; train_batch_size 8, not 4", "seed batch"),
        ("--seed", 1, "--resume_allow", "times", "batch"): ("seed 0, not 1:", "seed"),
    }
    for more, (words, kinds) in refused.items():
        status, said = call("sid", *flags, *LATEST, "--max_train_steps", 4, *more)
        assert status == 2 and f"{folder / 'checkpoint-2'} was trained with {words}" in said, said
        assert f"allow the change with --resume_allow {kinds}\n" in said and "Traceback" not in said
        assert contents(folder) == before
    status, said = call("dmd2", *flags, *LATEST, "--max_train_steps", 4, "--student.sigma", 2.5)
    assert status == 2 and "method SiD, not DMD2:" in said and contents(folder) == before

    more = ("--seed", 1, "--train_batch_size", 16, "--teacher", other, "--resume_allow", "seed", "batch", "teacher")
    status, said = call("sid", *flags, *LATEST, "--max_train_steps", 4, *more)
    assert status == 0, said
    assert "  seed: 0 -> 1\n" in said and f"  teacher: {teacher} -> {other}\n" in said
    first, second = (json.loads(line) for line in (folder / "history.jsonl").open())
    assert (first["step"], first["config"]["seed"], first["from"]) == (0, 0, None)
    assert (second["step"], second["config"]["seed"], second["from"]) == (2, 1, f"{folder / 'checkpoint-2'}")
    config = read_yaml(folder / "config.yaml")
    assert config["seed"] == 1 and config["resume_allow"] == []  # a permission is for one command


def test_what_else_changed_is_printed_and_kept(run, call, teacher, tmp_path):
    """Rates, steps, logging; a teacher that was moved is the same one. Nothing new: no line, no entry."""
    folder, flags = run
    status, said = call("sid", *flags, *LATEST, "--max_train_steps", 2)
    assert status == 0 and "is resumed with a changed configuration" not in said
    assert len((folder / "history.jsonl").read_text().splitlines()) == 1
    moved = shutil.copytree(teacher, tmp_path / "moved")
    more = ("--teacher", moved, "--learning_rate", 1e-6, "--logging_steps", 1, "--max_train_steps", 3)
    status, said = call("sid", *flags, *LATEST, *more)
    assert status == 0 and f"{folder / 'checkpoint-2'} is resumed with a changed configuration" in said
    rate = TABLE["sid"].config.train.learning_rate
    lines = (f"teacher: {teacher} -> {moved}", "max_train_steps: 2 -> 3", f"learning_rate: {rate} -> 1e-06")
    assert all(f"  {line}\n" in said for line in (*lines, "logging_steps: 10 -> 1"))
    assert [json.loads(line)["config"]["learning_rate"] for line in (folder / "history.jsonl").open()] == [rate, 1e-6]


def test_a_run_from_before_there_was_a_history(run, call):
    """Its config.yaml is compared, with a notice that the teacher cannot be, and kept as the first entry."""
    folder, flags = run
    (folder / "history.jsonl").unlink()
    status, said = call("sid", *flags, *LATEST, "--max_train_steps", 4, "--seed", 1)
    assert status == 2 and "seed 0, not 1" in said
    status, said = call("sid", *flags, *LATEST, "--max_train_steps", 3)
    assert status == 0 and "its teacher was not recorded, so the teachers' weights are not compared" in said
    assert "  max_train_steps: 2 -> 3\n" in said
    first, second = (json.loads(line) for line in (folder / "history.jsonl").open())
    assert first["config"]["max_train_steps"] == 2 and second["teacher"]["digests"].keys() == {"unet", "scheduler"}


def test_a_configuration_that_is_torn(run, call):
    """A message that says what to do; without it nothing is compared, and that is said."""
    folder, flags = run
    (folder / "history.jsonl").unlink()
    text = (folder / "config.yaml").read_text()
    for torn in ("", text[:3], text[: len(text) // 2], text[: text.rindex("seed:")], "seed: *a\n" + text):
        (folder / "config.yaml").write_text(torn)
        status, said = call("sid", *flags, *LATEST, "--max_train_steps", 3)
        assert status == 2 and f"error: {folder / 'config.yaml'} is" in said, said
        assert "or remove it, and nothing is compared" in said and "Traceback" not in said
    (folder / "config.yaml").unlink()
    status, said = call("sid", *flags, *LATEST, "--max_train_steps", 3)
    assert status == 0 and "there is no configuration beside it" in said


def test_a_history_that_is_damaged(tmp_path):
    good = json.dumps({"method": "SiD", "config": {"seed": 0}})
    for bad in ("{", "[]", "3", '{"method": "SiD"}', '{"method": 3, "config": {}}', '{"method": "a", "config": 3}'):
        (tmp_path / "history.jsonl").write_text(f"{good}\n{bad}\n")
        with pytest.raises(ValueError, match=r"history\.jsonl is damaged in line 2: delete that line"):
            history.last_entry(tmp_path)


def test_methods_around_methods_are_told_apart():
    from distill.methods import VSD, RewardGuided, SiD

    names = [history.name(method) for method in (SiD(), RewardGuided(SiD()), RewardGuided(VSD()))]
    assert names == ["SiD", "RewardGuided(SiD)", "RewardGuided(VSD)"]


# ---- the identity of a teacher ----


def test_a_digest_sees_any_tensor(tmp_path):
    """Of weights above a megabyte, too; not the names of folders, nor files that are not loaded."""
    folder = tmp_path / "a"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "X", "unet": ["diffusers", "UNet2DModel"]}')
    (folder / "unet" / "config.json").write_text("{}")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {f"layer.{i}": torch.randn(300, 300, generator=torch.manual_seed(i)) for i in range(5)}
    save_file(tensors, file)
    first = identity(folder, "a", None)["digests"]
    moved = shutil.copytree(folder, tmp_path / "b")
    (moved / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another set of weights")
    (moved / "README.md").write_text("# notes")
    assert identity(moved, "b", None)["digests"] == first != identity(moved, "b", "fp16")["digests"]
    for key in tensors:
        save_file(tensors | {key: tensors[key] * 1.001}, file)
        assert identity(folder, "a", None)["digests"] != first
    save_file(tensors | {"more": torch.zeros(1)}, file)
    assert identity(folder, "a", None)["digests"] != first
    save_file(tensors, file)
    assert identity(folder, "a", None)["digests"] == first
    (folder / "unet" / "config.json").write_text('{"flip_sin_to_cos": false}')
    assert identity(folder, "a", None)["digests"] != first


# ---- one process a folder ----

HOLD = """
import sys, time
from distill.files import folder_lock
with folder_lock(sys.argv[1], beside=sys.argv[2] == "True"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder():
    """holder(folder) -> a process that holds its lock, which lies in it or beside it."""
    processes = []

    def start(folder, beside=False):
        command = [sys.executable, "-c", HOLD, f"{folder}", f"{beside}"]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_second_run_in_one_folder_is_refused_at_once(holder, call, teacher, tmp_path):
    """Until the first one ends, however it ends. Nothing is left of either."""
    folder = tmp_path / "new" / "run"
    process = holder(folder)
    flags = ("--teacher", teacher, "--output_dir", folder, *SHORT, "--max_train_steps", 1)
    for more in ((), LATEST, ("--smoke",)):
        begun = time.monotonic()
        status, said = call("sid", *flags, *more)
        assert status == 2 and f"{folder} is in use by process {process.pid} on " in said
        assert "wait until it has ended, or choose another --output_dir" in said
        assert time.monotonic() - begun < 5
    assert [path.name for path in folder.iterdir()] == [".lock"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with folder_lock(folder):
        pass
    assert folder.is_dir() and not list(folder.iterdir())


def test_a_second_writer_of_a_folder_is_refused(holder, teacher, tmp_path, capsys):
    """Images, an export, a cache, pairs, a converted teacher, jobs: each by a message that names the folder."""
    from eval.leaderboard.jobs import Job
    from eval.leaderboard.jobs import run_jobs as start
    from eval.sampling.image_set import generate
    from pipelines.cache import encodings, pairs
    from pipelines.export import edm_convert, export

    out = tmp_path / "out"
    beside, inside = holder(out, True), holder(out)
    with pytest.raises(ValueError, match=rf"out is in use by process {beside.pid} .* choose another --out$"):
        generate(teacher, out, 2, 2, classes=10)
    with pytest.raises(ValueError, match=rf"out is in use by process {inside.pid} .* choose another folder"):
        start({"a": Job("a", ["-c", ""])}, out, 1)
    for module, argv, process in (
        (encodings, ["--pretrained_model_name_or_path", f"{teacher}", "--output_dir", f"{out}"], inside),
        (pairs, ["--pretrained_model_name_or_path", f"{teacher}", "--output_dir", f"{out}"], inside),
        (edm_convert, ["file.pkl", f"{out}"], beside),
        (export, export.ExportArguments(run=f"{tmp_path / 'run'}", output_dir=f"{out}"), beside),
    ):
        with pytest.raises(SystemExit) as end:
            module.main(argv)
        assert end.value.code == 2 and f"{out} is in use by process {process.pid}" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_a_command_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), folder_lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").is_file()
        raise KeyError
    with folder_lock(tmp_path / "out", beside=True), pytest.raises(ValueError, match="choose another --out"):
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
        (tmp_path / "link").symlink_to(tmp_path / "out")
        with folder_lock(tmp_path / "link", "--out", beside=True):  # another name of the folder
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_where_there_are_no_locks(tmp_path, monkeypatch, capsys):
    """A warning, and the work goes on; a folder that cannot be written is said by what writes it."""
    import fcntl

    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder_lock(tmp_path / "run"):
        said = capsys.readouterr().err
    assert f"{tmp_path / 'run'} is not locked (its file system has no locks: Function not implemented)" in said
    (tmp_path / "file").write_text("")
    with folder_lock(tmp_path / "file" / "run"):
        assert not capsys.readouterr().err


def test_the_first_process_locks_for_all(holder, tmp_path, monkeypatch):
    holder(tmp_path)
    for name in ("RANK", "OMPI_COMM_WORLD_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with folder_lock(tmp_path):
                pass
            patch.setenv(name, "0")
            with pytest.raises(ValueError, match="is in use"), folder_lock(tmp_path):
                pass


def test_trackers_go_on(tmp_path):
    """The W&B run of a folder keeps its id where it is resumed; a run that begins anew has another."""
    calls = []
    accelerator = SimpleNamespace(is_main_process=True, init_trackers=lambda *a: calls.append(a))
    cfg = TrainConfig(output_dir=f"{tmp_path / 'run'}", report_to="wandb", tracker_project_name="lab")
    (tmp_path / "run").mkdir()
    for resumed in (False, True, False):
        start_trackers(cfg, accelerator, {"seed": 3, "method": {"alpha": 1.5, "taps": None, "kappa": [1, 2]}}, resumed)
    start_trackers(replace(cfg, tracker_run_name="first", report_to="tensorboard"), accelerator, {}, True)
    projects, values, options = zip(*calls)
    assert {*projects} == {"lab"}
    assert values[0] == {"seed": 3, "method.alpha": 1.5, "method.taps": "None", "method.kappa": "[1, 2]"}
    first, again, anew, other = (option["wandb"] for option in options)
    assert first == again and first["name"] == "run" and first["resume"] == "allow" and first["dir"] == cfg.output_dir
    assert anew["id"] != first["id"] and other == {"dir": cfg.output_dir, "name": "first"}


def test_grids(tmp_path):
    """Rows of the teacher, of step 0 and of now, prompts below; 8 columns at most; the rows outlive the process."""
    cfg = TrainConfig(output_dir=f"{tmp_path}", max_train_steps=9)
    log = Log(cfg, Accelerator(cpu=True))
    grey = lambda level: torch.full((10, 1, 64, 64), level)
    log.add_reference("teacher", grey(-1.0))
    log.images(grey(0.0), 0, ["a"] * 10)
    log.add_reference("step 0", grey(0.0))
    again = Log(cfg, Accelerator(cpu=True), 3)
    again.images(grey(1.0), 4, ["a prompt"] * 9 + ["\u4e00"])
    picture = Image.open(tmp_path / "samples" / "step-000004.png")
    assert picture.size == (72 + 8 * 64, 2 * (3 * 64 + 16))
    assert [picture.getpixel((100, 64 * row + 32))[0] for row in range(3)] == [0, 128, 255]
    assert picture.getpixel((500, 300)) == (255, 255, 255)  # ten images: the second block has two
    below = picture.crop((72, 3 * 64, 72 + 64, 3 * 64 + 16))
    assert np.asarray(below).std() > 0  # text
    video = torch.linspace(-1, 1, 5)[:, None, None].expand(2, 3, 5, 16, 1400)  # frames from black to white
    again.images(video, 5, ["a", "b"])
    with Image.open(tmp_path / "samples" / "step-000005.gif") as animation:
        assert (animation.n_frames, animation.size) == (5, (1400, 8))
