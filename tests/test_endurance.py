"""Hard to kill: what a run that was killed leaves, and that it goes on from there."""

import json

import pytest
from accelerate import Accelerator

from distill.log import Log
from distill.trainer import TrainConfig

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
