"""How far a command is, where stderr is no terminal: whole lines with rates and the time that is left, not too many."""

import re
import sys

import pytest
from tqdm import std

from distill import progress


@pytest.fixture
def clock(monkeypatch):
    """The time of the bars, as a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(std, "time", lambda: now[0])
    return now


def test_lines_without_a_terminal(clock, capsys):
    """At the start, after the first unit, every ten seconds, later after a tenth of the time; at the end."""
    with progress.bar(1000, "step", "train") as bar:
        for _ in range(1000):
            clock[0] += 1
            bar.update()
            bar.set_postfix({"loss": "0.5"})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 0/1000 step [00:00<?, ?step/s]"
    assert lines[1].startswith("train: 1/1000 step [00:01<16:39, ")
    assert lines[2] == "train: 10/1000 step [00:10<16:30,  1.00step/s, loss=0.5]"
    assert lines[-1] == "train: 1000/1000 step [16:40<00:00,  1.00step/s, loss=0.5]"
    done = [int(re.search(r" (\d+)/", line)[1]) for line in lines]
    assert len(done) < 45 and done == sorted(done)
    gaps = [b - a for a, b in zip(done[2:], done[3:-1])]
    assert gaps[0] == 10 and 60 < gaps[-1] <= 100


def test_nested_bars_are_lines_without_terminal_codes(clock, capsys):
    """The inner bar's lines stand between those of the outer one, and no line is printed twice in a row."""
    for _ in progress.track((1, 2), "folder", "score"):
        for _ in progress.track((1, 2, 3), "image", "read"):
            clock[0] += 1
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "\x1b" not in text and "[A" not in text
    assert all(a != b for a, b in zip(lines, lines[1:]))
    names = [line.partition(":")[0] for line in lines]
    assert names[:2] == ["score", "read"] and names[-1] == "score"
    assert sum(line.startswith("read: 3/3 image") for line in lines) == 2


def test_a_resumed_and_a_hidden_bar(clock, capsys):
    with progress.bar(10, "step", first=8) as bar:
        clock[0] += 2
        bar.update()
    assert capsys.readouterr().err.splitlines()[1] == "9/10 step [00:02<00:02,  2.00s/step]"
    with progress.bar(10, "step", shown=False) as bar:
        bar.update(10)
    assert list(progress.track((1, 2), "folder", shown=False)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.bar(3, "step") as bar:
        assert type(bar) is std.tqdm


def test_a_stage_says_its_time(capsys, monkeypatch):
    times = iter((5.0, 190.4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with progress.stage("measure"):
        pass
    assert capsys.readouterr().err == "measure ...\nmeasure: 3:05 min\n"
    assert [progress.format_seconds(s) for s in (0.4, 59.6, 3599, 7800)] == ["0 s", "1:00 min", "59:59 min", "2:10 h"]
