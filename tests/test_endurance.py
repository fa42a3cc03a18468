"""Hard to kill: what a run that was killed leaves, and that it goes on from there.

`python tests/test_endurance.py 200` kills a short run that often and prints what came of it; 6 times is a test.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import tiny

from distill import checkpoint
from distill.data import Digits
from distill.log import Log
from distill.methods import SiD
from distill.roles import build
from distill.schedule import Flow
from distill.trainer import TrainConfig, train

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
    return [folder.name for folder in checkpoint.found(run)]


HARM = {
    "torn": (cut, "ema.safetensors", "ema.safetensors is torn: it has"),
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
    *_, state = steps(3, checkpoint.found(run)[-1])
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


def test_a_run_takes_the_one_before(run, capsys):
    """--resume_from_checkpoint latest; one that is named must be whole, and this is seen before any work."""
    from pipelines.run import check
    from recipes.sid_digits import CONFIG

    def resumed(name):
        cfg = replace(CONFIG.train, output_dir=f"{run}", resume_from_checkpoint=name, max_train_steps=2)
        return check(replace(CONFIG, smoke=True, train=cfg), run)

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
    done, sync, rename = [], checkpoint._sync, os.replace
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (done.append(path), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(b), rename(a, b)))
    (state,) = steps(3, made / "checkpoint-3")
    folder = checkpoint.save(state, tmp_path)
    partial = tmp_path / ".checkpoint-3.partial"
    assert done[-3:] == [partial, folder, tmp_path]
    assert sorted(done[:-3]) == sorted(partial / file.name for file in folder.iterdir())
    assert load_file(folder / "ema.safetensors")


# ---- signals ----


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """digits(folder, flags) -> the status of a run of five steps on a tiny teacher, with this process's handlers."""
    from pipelines import tiny as teachers
    from recipes.sid_digits import CONFIG, main

    teacher = tmp_path_factory.mktemp("teacher")
    teachers.save("edm", teacher)

    def call(folder, *flags):
        try:
            main(CONFIG, [*SHORT.split(), "--teacher", f"{teacher}", "--output_dir", f"{folder}", *flags])
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
    assert digits(tmp_path) == status and not checkpoint.found(tmp_path)
    assert "interrupted: nothing of this step is saved" in capsys.readouterr().err

    monkeypatch.setattr(Digits, "__call__", at(number))
    assert digits(tmp_path, *LATEST) == status and signal.getsignal(number) is handler
    assert [folder.name for folder in checkpoint.found(tmp_path)] == ["checkpoint-3"]
    assert f"saved {tmp_path / 'checkpoint-3'}. Go on with --resume" in capsys.readouterr().err

    monkeypatch.setattr(Digits, "__call__", right)
    assert digits(tmp_path, *LATEST) == 0 and (tmp_path / "pipeline" / "model_index.json").is_file()


# ---- a campaign of kills ----

RUN = "--max_train_steps 12 --checkpointing_steps 2 --logging_steps 1 --train_batch_size 8 --validation_images 4"


def begun(teacher, folder):
    """The process of a run that starts, or goes on. A fork: what is imported is not imported again."""
    if child := os.fork():
        return child
    status = 70
    try:
        from recipes.sid_digits import CONFIG, main

        with (folder.parent / "said.txt").open("a") as said:
            os.dup2(said.fileno(), 2)
        main(CONFIG, [*RUN.split(), "--teacher", f"{teacher}", "--output_dir", f"{folder}", *LATEST])
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child, seconds):
    """Its status, as subprocess gives it, or None if it still runs after so long."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def result(folder):
    """Every byte that a finished run must have: the last checkpoint, the exported weights; and the steps logged."""
    last = checkpoint.found(folder)[-1]
    files = [*last.iterdir(), *(folder / "pipeline").rglob("*.safetensors")]
    lines = [json.loads(line)["step"] for line in (folder / "log.jsonl").open()]
    return {f"{file.relative_to(folder)}": file.read_bytes() for file in files}, lines


def campaign(kills, seed=0):
    """Kill at random moments until `kills` are done, go on after each; the counts. A difference is an error."""
    from pipelines import tiny as teachers

    torch.set_num_threads(1)
    chance, counts = random.Random(seed), {"runs": 0, "SIGKILL": 0, "SIGTERM, saved": 0, "SIGTERM, at once": 0}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        teachers.save("edm", home / "teacher")
        assert ended(begun(home / "teacher", home / "whole"), 600) == 0, (home / "said.txt").read_text()
        start = time.monotonic()  # the second one is as fast as those to come
        assert ended(begun(home / "teacher", home / "again"), 600) == 0
        seconds, whole = time.monotonic() - start, result(home / "whole")
        assert result(home / "again") == whole
        done = 0
        while done < kills:
            folder, status, newest = home / f"run-{counts['runs']}", None, 0
            while status != 0:
                child = begun(home / "teacher", folder)
                status = ended(child, chance.uniform(0, seconds) if done < kills else 600)
                if status is None:
                    number = chance.choice((signal.SIGKILL, signal.SIGTERM))
                    os.kill(child, number)
                    status = ended(child, 600)
                kind = {0: None, -9: "SIGKILL", 143: "SIGTERM, saved", -15: "SIGTERM, at once"}.get(status, "")
                assert kind != "", (status, (home / "said.txt").read_text()[-3000:])
                if kind:  # else it has ended before
                    counts[kind] += 1
                    done += 1
                last = max([checkpoint.step(f) for f in checkpoint.found(folder)], default=0)
                assert last >= newest, "a checkpoint is lost"
                newest = last
            assert result(folder) == whole
            shutil.rmtree(folder)
            counts["runs"] += 1
        assert "is skipped" not in (home / "said.txt").read_text(), "a kill has left a damaged checkpoint"
    return counts


def test_six_kills():
    """In a process of its own, for it forks."""
    done = subprocess.run([sys.executable, __file__, "6"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts.pop("runs") >= 1 and sum(counts.values()) == 6


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, f"{Path(__file__).resolve().parent.parent}")
    sys.stdout.write(json.dumps(campaign(int(sys.argv[1]))) + "\n")
