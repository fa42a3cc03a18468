"""Hard to kill: what a run that was killed leaves, and that it goes on from there. campaign.py does it at random."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import tiny

from distill.data import Digits
from distill.diffusion.schedule import Flow
from distill.methods import SiD
from distill.training import checkpoint
from distill.training.build import build
from distill.training.config import TrainConfig
from distill.training.log import Log
from distill.training.loop import train

# ---- the log ----

LINES = [json.dumps({"step": step, "seconds": step / 2, "student/loss": 0.1 * step}) + "\n" for step in (1, 2, 3)]


@pytest.mark.parametrize("cut", (1, 2, 20, len(LINES[2])))
def test_a_torn_last_line_of_the_log_is_dropped(cut, tmp_path):
    """Killed while it wrote; a line that lacks only its end is whole."""
    (tmp_path / "log.jsonl").write_text("".join(LINES)[:-cut])
    Log(TrainConfig(output_dir=f"{tmp_path}", max_train_steps=9), Accelerator(cpu=True), 3).close()
    assert (tmp_path / "log.jsonl").read_text() == "".join(LINES if cut == 1 else LINES[:2])
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_damaged_line_of_the_log_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text(LINES[0] + LINES[1][:9] + "\n" + LINES[2])
    with pytest.raises(ValueError, match="log.jsonl is damaged in line 2: delete"):
        Log(TrainConfig(output_dir=f"{tmp_path}", max_train_steps=9), Accelerator(cpu=True), 3)


# ---- checkpoints ----


def steps(last, resume=None):
    """The states of a run of SiD on points."""
    nets = build(SiD(), tiny(Flow(), "flow", dtype=torch.float32), (2,))
    cfg = TrainConfig(max_train_steps=last, train_batch_size=4, learning_rate=1e-2, lr_scheduler="constant")
    yield from train(SiD(), nets, lambda draw: {}, cfg, Accelerator(cpu=True), resume)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for state in steps(3):
        checkpoint.save(state, folder)
    return folder


@pytest.fixture
def run(made, tmp_path):
    """Three checkpoints."""
    return shutil.copytree(made, tmp_path / "run")


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


def flip(file):
    """One bit, where no format would notice: in the last number."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def names(run):
    return [folder.name for folder in checkpoint.list_intact_checkpoints(run)]


HARM = {
    "torn": (cut, "ema.safetensors", "ema.safetensors is truncated: it has"),
    "corrupted": (flip, "student.safetensors", "student.safetensors is corrupted: its bytes are not"),
    "missing": (os.remove, "optimizer_fake.safetensors", "optimizer_fake.safetensors cannot be read"),
    "torn facts": (cut, "state.json", "state.json is missing or damaged"),
    "no facts": (os.remove, "state.json", "state.json is missing or damaged"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_skipped_and_named(harm, run, capsys):
    """The newest ones: the one before them is the last; to load a damaged one is an error."""
    spoil, name, says = HARM[harm]
    spoil(run / "checkpoint-3" / name)
    assert names(run) == ["checkpoint-1", "checkpoint-2"]
    said = capsys.readouterr().err
    assert said.startswith(f"{run / 'checkpoint-3'} is skipped: ") and says in said
    with pytest.raises(ValueError, match=says):
        next(steps(4, run / "checkpoint-3"))
    spoil(run / "checkpoint-2" / name)
    assert names(run) == ["checkpoint-1"]
    spoil(run / "checkpoint-1" / name)
    assert names(run) == []


@pytest.mark.parametrize("harm", ("torn", "corrupted"))
def test_it_is_written_again(harm, run, made):
    """The run goes on from the one before, and comes to the same checkpoint."""
    spoil, name, _ = HARM[harm]
    spoil(run / "checkpoint-3" / name)
    *_, state = steps(3, checkpoint.list_intact_checkpoints(run)[-1])
    checkpoint.save(state, run)
    assert {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()} == {
        run / p.relative_to(made): p.read_bytes() for p in sorted(made.rglob("*")) if p.is_file()
    }


def test_the_limit_keeps_the_last_good_one(run):
    """Neither a damaged one nor a later one counts for what was just saved."""
    flip(run / "checkpoint-3" / "ema.safetensors")
    *_, state = steps(2, run / "checkpoint-1")
    checkpoint.save(state, run, limit=1)
    assert names(run) == ["checkpoint-2"]
    *_, state = steps(4, run / "checkpoint-2")
    cut(run / "checkpoint-3" / "ema.safetensors")
    checkpoint.save(state, run, limit=2)
    assert names(run) == ["checkpoint-2", "checkpoint-4"] and not (run / "checkpoint-3").exists()
    assert {p.name for p in run.iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_a_linked_checkpoint_counts_and_its_target_stays(run, tmp_path):
    """Beyond the limit the link is removed alone; one that leads nowhere, or a file, is no checkpoint."""
    kept = (run / "checkpoint-1").rename(tmp_path / "checkpoint-1")
    (run / "checkpoint-1").symlink_to(kept)
    (run / "checkpoint-4").symlink_to(tmp_path / "nowhere")
    (run / "checkpoint-9").write_text("notes")
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    *_, state = steps(4, run / "checkpoint-3")
    checkpoint.save(state, run, limit=2)
    assert names(run) == ["checkpoint-3", "checkpoint-4"] and not (run / "checkpoint-4").is_symlink()
    assert not (run / "checkpoint-1").is_symlink() and checkpoint.find_corruption(kept) is None
    assert {p.name for p in run.iterdir()} == {"checkpoint-3", "checkpoint-4", "checkpoint-9"}


def test_a_renamed_checkpoint_says_its_step(run, capsys):
    """It would be taken for the newest one, and be in the way of the one whose name it has."""
    (run / "checkpoint-1").rename(run / "checkpoint-4")
    assert names(run) == ["checkpoint-2", "checkpoint-3"]
    says = f"{run / 'checkpoint-4'} was renamed: it holds step 1, so call it checkpoint-1 again"
    assert says in capsys.readouterr().err
    with pytest.raises(ValueError, match="was renamed: it holds step 1"):
        next(steps(5, run / "checkpoint-4"))
    *_, state = steps(4, run / "checkpoint-3")
    checkpoint.save(state, run)
    assert names(run) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_a_run_takes_the_one_before(run, capsys):
    """--resume_from_checkpoint latest; one that is named must be whole, and this is seen before any work."""
    from pipelines.run import validate_run
    from recipes.digits import TABLE

    config = TABLE["sid"].config

    def resumed(name):
        cfg = replace(config.train, output_dir=f"{run}", resume_from_checkpoint=name, max_train_steps=2)
        return validate_run(replace(config, smoke=True, train=cfg), run)

    flip(run / "checkpoint-3" / "ema.safetensors")
    assert resumed("latest") == run / "checkpoint-2"
    assert "checkpoint-3 is skipped" in capsys.readouterr().err
    assert resumed(f"{run / 'checkpoint-1'}") == run / "checkpoint-1"
    with pytest.raises(ValueError, match="ema.safetensors is corrupted: .*holds .'checkpoint-1', 'checkpoint-2'"):
        resumed(f"{run / 'checkpoint-3'}")


def test_one_without_checksums_loads(run):
    """Of before there were any; torn files are still seen."""
    before = {"step": 3, "torch": torch.__version__}
    (run / "checkpoint-3" / "state.json").write_text(json.dumps(before))
    assert names(run)[-1] == "checkpoint-3"
    assert next(steps(3, run / "checkpoint-3")).step == 3
    cut(run / "checkpoint-3" / "fake.safetensors")
    assert names(run)[-1] == "checkpoint-2"


def test_on_the_disk_before_it_is_named(made, tmp_path, monkeypatch):
    """Every file and its folder are synchronised before the rename, the rename after it."""
    done, sync, rename = [], checkpoint.write.sync_to_disk, os.replace
    monkeypatch.setattr(checkpoint.write, "sync_to_disk", lambda path: (done.append(path), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(b), rename(a, b)))
    (state,) = steps(3, made / "checkpoint-3")
    folder = checkpoint.save(state, tmp_path)
    partial = tmp_path / ".checkpoint-3.partial"
    assert done[-3:] == [partial, folder, tmp_path]
    assert sorted(done[:-3]) == sorted(partial / file.name for file in folder.iterdir())
    assert load_file(folder / "ema.safetensors")


# ---- saving in the background ----


@pytest.fixture
def held(monkeypatch):
    """(begun, go): a checkpoint's first file waits, once `begun` is set, until `go` is."""
    begun, go, right = threading.Event(), threading.Event(), checkpoint.write.save_file

    def save_file(*args):
        begun.set()
        assert go.wait(60)
        right(*args)

    monkeypatch.setattr(checkpoint.write, "save_file", save_file)
    yield begun, go
    go.set()


def test_what_is_saved_is_the_state_of_the_call(made, held, tmp_path):
    """Steps that are made while it is written are not in it: every byte is as of a save that training waited for."""
    begun, go = held
    states = steps(3)
    with checkpoint.Saver(tmp_path) as saver:
        for state in states:
            saver.save(state)
            if state.step == 2:
                assert begun.wait(60)
                next(states)
                assert names(tmp_path) == ["checkpoint-1"]
                go.set()
            elif state.step == 1:
                go.set()
                saver.wait()
                go.clear(), begun.clear()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    for file in tmp_path.rglob("*.*"):
        assert file.is_dir() or file.read_bytes() == (made / file.relative_to(tmp_path)).read_bytes(), file


def test_one_save_at_a_time_with_the_limit(tmp_path):
    """What stays is what `limit` says."""
    with checkpoint.Saver(tmp_path, limit=2) as saver:
        for state in steps(5):
            saver.save(state)
            assert sum(thread.name == "checkpoint" for thread in threading.enumerate()) <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_without_memory_for_a_copy_training_waits(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.write.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    with checkpoint.Saver(tmp_path) as saver:
        for state in steps(3):
            saver.save(state)
            assert saver.thread is None and names(tmp_path)[-1] == f"checkpoint-{state.step}"
    assert "training waits for checkpoints" in capsys.readouterr().err
    assert all((made / p.relative_to(tmp_path)).read_bytes() == p.read_bytes() for p in tmp_path.glob("*/*"))


@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EROFS))
def test_what_a_write_raises_is_raised_by_the_next_call(number, tmp_path, monkeypatch):
    """By raise_pending_error, save, wait and on leaving; once. The checkpoint before it is whole, and it is alone."""
    error, right = OSError(number, os.strerror(number)), checkpoint.write.sync_to_disk

    def sync(path):
        if path.name == "fake.safetensors" and "-1" not in path.parent.name:
            raise error
        right(path)

    monkeypatch.setattr(checkpoint.write, "sync_to_disk", sync)
    for call in ("raise_pending_error", "save", "wait", "leave"):
        *_, state = steps(2)
        with pytest.raises(OSError) as raised, checkpoint.Saver(tmp_path) as saver:
            state.step = 1
            saver.save(state)
            saver.wait()
            state.step = 2
            saver.save(state)
            saver.thread.join()
            if call != "leave":
                getattr(saver, call)(*[state] * (call == "save"))
        assert raised.value is error and saver.error is None
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"] == names(tmp_path)


REFUSED = {errno.ENOSPC: "the disk is full", errno.EROFS: "the disk is read-only", errno.EACCES: "permission is denied"}


@pytest.mark.parametrize(("what", "number"), zip(("checkpoint", "log", "samples"), REFUSED, strict=True))
def test_a_disk_that_refuses_stops_the_run(what, number, digits, tmp_path, monkeypatch, capsys):
    """In the middle of it, with a message and no traceback; it goes on when there is room."""
    refuse, right = OSError(number, os.strerror(number), "a file"), Path.open

    def write(*args, **kwargs):
        raise refuse

    def opened(file, mode="r", *args, **kwargs):
        if file.name == "log.jsonl" and mode == "a" and '"step": 2' in file.read_text():
            raise refuse
        return right(file, mode, *args, **kwargs)

    places = {"checkpoint": (checkpoint.write, "write_files", write), "log": (Path, "open", opened)}
    places["samples"] = Log, "images", lambda log, x, step, captions: write() if step else None
    flags = ("--logging_steps", "1", "--checkpointing_steps", "2", "--validation_steps", "3")
    with monkeypatch.context() as patch:
        patch.setattr(*places[what])
        assert digits(tmp_path, *flags) == 2
    said = capsys.readouterr().err
    assert f"{REFUSED[number]} ([Errno {number}]" in said and "go on with --resume_from_checkpoint latest" in said
    assert "Traceback" not in said and not (tmp_path / "pipeline").exists()
    assert names(tmp_path) == ([] if what == "checkpoint" else ["checkpoint-2"])
    assert digits(tmp_path, *flags, *LATEST) == 0 and names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


def test_a_tracker_that_vanishes_is_left_behind(tmp_path, capsys):
    """At a line, a grid or the end: the run says so once and goes on; the others are still told."""

    class Tracker:
        name, requires_logging_directory, tracker = "flaky", False, None

        def __init__(self, fails):
            self.fails, self.told = fails, []

        def _tell(self, what):
            self.told.append(what)
            if what in self.fails:
                raise ConnectionError("the server is gone")

        def log(self, values, step):
            self._tell(step)

        def finish(self):
            self._tell("end")

    trackers = first, second, _ = Tracker((2, 3)), Tracker(()), Tracker(("end",))
    accelerator = Accelerator(cpu=True)
    accelerator.trackers = [*trackers]
    log = Log(TrainConfig(output_dir=f"{tmp_path}", max_train_steps=3, logging_steps=1), accelerator)
    for state in steps(3):
        log(state)
    log.close()
    assert first.told == [1, 2] and second.told == [1, 2, 3, "end"]
    assert capsys.readouterr().err.count("flaky has failed (the server is gone): the run goes on without it") == 2
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()] == [1, 2, 3]


def test_a_tracker_that_does_not_start_is_a_message(digits, tmp_path, monkeypatch, capsys):
    def start(*args, **kwargs):
        raise ConnectionError("no route to the server")

    monkeypatch.setattr(Accelerator, "init_trackers", start)
    assert digits(tmp_path, "--report_to", "tensorboard") == 2
    said = capsys.readouterr().err
    assert "report_to is 'tensorboard', which does not start (no route to the server)" in said
    assert "Traceback" not in said


# ---- signals ----


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """digits(folder, flags) -> the status of a run of five steps on a tiny teacher, with this process's handlers."""
    from pipelines.families import tiny as teachers
    from pipelines.run import main
    from recipes.digits import TABLE

    teacher = tmp_path_factory.mktemp("teacher")
    teachers.save("edm", teacher)

    def call(folder, *flags):
        try:
            main(TABLE["sid"].config, [*SHORT.split(), "--teacher", f"{teacher}", "--output_dir", f"{folder}", *flags])
        except SystemExit as error:
            return error.code
        return 0

    return call


SHORT = "--max_train_steps 5 --checkpointing_steps 5 --train_batch_size 8 --validation_images 4 --validation_steps 0"
LATEST = ("--resume_from_checkpoint", "latest")


@pytest.mark.parametrize(("number", "status"), ((signal.SIGTERM, 143), (signal.SIGUSR1, 138)))
def test_a_preempted_run_ends_the_step_and_goes_on(number, status, digits, tmp_path, monkeypatch, capsys):
    """Within a step: it is finished and saved, the status says why; a second signal exits without."""
    handler, right = signal.getsignal(number), Digits.__call__

    def at(*signals):
        def call(data, draw):
            if (draw.step, draw.player) == (2, "student"):
                for one in signals:
                    signal.raise_signal(one)
            return right(data, draw)

        return call

    monkeypatch.setattr(Digits, "__call__", at(signal.SIGINT, number))
    assert digits(tmp_path) == status and not checkpoint.list_intact_checkpoints(tmp_path)
    assert "interrupted: nothing of this step is saved" in capsys.readouterr().err

    monkeypatch.setattr(Digits, "__call__", at(number))
    assert digits(tmp_path, *LATEST) == status and signal.getsignal(number) is handler
    assert [folder.name for folder in checkpoint.list_intact_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert f"saved {tmp_path / 'checkpoint-3'}. Go on with --resume" in capsys.readouterr().err

    monkeypatch.setattr(Digits, "__call__", right)
    assert digits(tmp_path, *LATEST) == 0 and (tmp_path / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize("again", (False, True), ids=("once", "twice"))
def test_a_signal_while_a_checkpoint_is_written(again, held, digits, tmp_path, monkeypatch):
    """The first one finishes the write, the step and a checkpoint of it; a second one waits for nothing."""
    begun, go = held
    right = Digits.__call__

    def call(data, draw):
        if (draw.step, draw.player) == (2, "student"):
            assert begun.wait(60)
            signal.raise_signal(signal.SIGTERM)
            if again:
                signal.raise_signal(signal.SIGTERM)
            go.set()
        return right(data, draw)

    monkeypatch.setattr(Digits, "__call__", call)
    assert digits(tmp_path, "--checkpointing_steps", "2") == 143
    assert names(tmp_path) == ([] if again else ["checkpoint-2", "checkpoint-3"])


def test_a_signal_while_the_last_checkpoint_is_written(digits, tmp_path, monkeypatch):
    """Nothing is left to train, the export is: it is done by the run that goes on."""
    wait = checkpoint.Saver.wait

    def told(saver):
        if saver.thread and not told.done:
            told.done = True
            signal.raise_signal(signal.SIGTERM)
        wait(saver)

    told.done = False
    monkeypatch.setattr(checkpoint.Saver, "wait", told)
    assert digits(tmp_path) == 143 and names(tmp_path) == ["checkpoint-5"] and not (tmp_path / "pipeline").exists()
    assert digits(tmp_path, *LATEST) == 0 and (tmp_path / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize("launched", (True, False), ids=("by a launcher", "by a shell"))
def test_a_run_ends_with_its_launcher(launched, digits, tmp_path, monkeypatch):
    """`accelerate launch` was killed alone: as by SIGTERM. A shell may go: its job runs on."""
    right, parent = Digits.__call__, [os.getppid()]

    def call(data, draw):
        if draw.step == 2:
            parent[0] = 1
        return right(data, draw)

    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(os, "getppid", lambda: parent[0])
    monkeypatch.setattr(Digits, "__call__", call)
    assert digits(tmp_path) == (143 if launched else 0)
    assert names(tmp_path) == ["checkpoint-3" if launched else "checkpoint-5"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", ("0", "1"))
def test_a_signal_to_one_of_two_processes_ends_both(rank, tmp_path):
    """After the same step: the first one saves it and exits with 128 + the signal, the other one with 0."""
    from pipelines.families import tiny as teachers

    teachers.save("edm", tmp_path / "teacher")
    root, folder, log = Path(__file__).resolve().parents[3], tmp_path / "run", tmp_path / "run" / "log.jsonl"
    flags = [
        *SHORT.split(),
        "--teacher",
        f"{tmp_path / 'teacher'}",
        "--output_dir",
        f"{folder}",
        "--logging_steps",
        "1",
    ]
    command = "-m torch.distributed.run --standalone --nproc_per_node 2 recipes/train.py --method sid".split()
    env = os.environ | {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": f"{root}"}
    command = [sys.executable, *command, *flags, "--max_train_steps", "100000", "--checkpointing_steps", "0"]
    launcher = subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (log.is_file() and log.read_text().count("\n") > 2):
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        (child,) = (c for c in psutil.Process(launcher.pid).children() if c.environ().get("RANK") == rank)
        child.send_signal(signal.SIGTERM)
        said = launcher.communicate(timeout=120)[1]
    finally:
        launcher.kill()
    (saved,) = checkpoint.list_intact_checkpoints(folder)
    assert f"interrupted; saved {saved}. Go on with" in said and checkpoint.read_step(saved) == len(
        log.open().readlines()
    )
    assert "exitcode  : 143" in said and "rank      : 0" in said and "NO_OTHER_FAILURES" in said
    assert "Connection closed" not in said and not (folder / ".lock").exists()


# ---- a campaign of faults ----


@pytest.mark.slow
def test_a_short_campaign():
    """In a process of its own, for it forks: three signals, on one process and on two, and damage."""
    command = [
        sys.executable,
        Path(__file__).resolve().parents[2] / "support" / "campaign.py",
        "--kills",
        "3",
        "--disks",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if " | SIG" in line]
    assert sum(int(often) for *_, often, _ in rows) == 3 and {row[0] for row in rows} == {"| 1", "| 2"}
