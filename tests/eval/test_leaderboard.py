"""The board as one job: what is done is skipped, what is killed goes on, what fails is named; figures in a card."""

import datetime
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rows import row

from eval.leaderboard import entries, jobs
from eval.leaderboard.commands import run_board, write_card, write_page
from eval.leaderboard.jobs import Job, JobFailure, run_jobs
from eval.leaderboard.tables import average_seeds
from eval.sampling import cost
from eval.sampling.cost import measure_cost, parameters
from pipelines.export.card import Card, Result, add_results, python_block
from pipelines.export.license import License


def test_a_board_of_a_protocol_of_ones_own(tmp_path, monkeypatch):
    """Its seeds, its name in titles, its content among what a row is made of; the board's real images in the score."""
    own = tmp_path / "own.yaml"
    text = "size: 8\nlabels: 4\nseeds: [3, 4]\nmetrics: [kid]\n"
    own.write_text(text)
    tree = {
        "protocols": [f"{own}"],
        "reference": "photos",
        "entries": [{"model": "a"}, {"model": "b", "reference": "x"}],
    }
    one, other = entries.list_entries(tree)
    assert one.title == "a-own" and one.seeds == (3, 4) and (one.reference, other.reference) == ("photos", "x")
    *samples, score = [job.command for job in one.jobs(entries.Path("o")).values()]
    assert len(samples) == 2 and all(command[command.index("--protocol") + 1] == f"{own}" for command in samples)
    assert score[-2:] == ["--reference", "photos"]
    before = one.request()
    own.write_text(text.replace("kid", "vendi"))
    assert one.request()["protocol_hash"] != before["protocol_hash"]
    assert {"reference", "protocol_hash"}.isdisjoint(entries.Entry("m").request()), "as in boards of earlier versions"
    todo = []
    evaluate = lambda found, *_: (todo.extend(found) or [row("a", 1.0)], {})
    monkeypatch.setattr(entries, "evaluate_entries", evaluate)
    (tmp_path / "board.yaml").write_text(json.dumps({"protocols": [f"{own}"], "entries": tree["entries"]}))
    run_board(tmp_path / "board.yaml", tmp_path / "out", reference=Path("faces"))
    assert [entry.reference for entry in todo] == ["faces", "x"], "an entry's own goes before"
    own.write_text(text.replace("kid", "kidd"))
    with pytest.raises(ValueError, match="no metric 'kidd'; the nearest is kid"):
        entries.list_entries(tree)


def test_a_board_is_a_product():
    tree = {
        "out": "x",
        "workers": 2,
        "protocols": ["digits", "cifar10-edm"],
        "entries": [
            {"model": "runs/teacher", "steps": [5, 9], "guidance": [1, 2.5], "seeds": 7},
            {"model": "runs/dmd2/pipeline", "protocols": "digits", "generate": {"dtype": "bfloat16"}},
        ],
    }
    found = entries.list_entries(tree)
    assert len(found) == 9 and len({e.title for e in found}) == 9
    assert found[1].title == "teacher-5-steps-guidance-2.5-digits" and found[1].seeds == (7,)
    assert found[-1].name == "dmd2" and found[-1].steps is None and found[-1].seeds == (0, 1, 2), "the protocol's"
    jobs = found[-1].jobs(entries.Path("o"))
    assert [job.after for job in jobs.values()] == [(), (), (), tuple(jobs)[:3]]
    first = " ".join(next(iter(jobs.values())).command)
    assert (
        "-m eval.generate" in first and "--dtype bfloat16" in first and "--seed 0" in first and "--steps" not in first
    )
    launched = entries.Entry("m", "m", launch="--num_processes 2").jobs(entries.Path("o"))
    assert launched["m-digits-0"].command[:5] == [
        "-m", "accelerate.commands.launch", "--num_processes", "2", "-m",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "tree, match",
    [
        ({}, "needs a list `entries`"),
        ({"entries": [{"steps": 1}]}, "entry 0 .* needs at least a model"),
        ({"entries": [{"model": "a", "stepz": 1}]}, "entry 0, a, has 'stepz'; the nearest is steps; there are base"),
        ({"entries": [{"model": "a"}, {"model": "b/a"}]}, "two entries of the board are called a-digits"),
        ({"entries": [{"model": ["a"]}]}, r"model is \['a'\]; it must be text"),
        (
            {"entries": [{"model": "a", "steps": [1, "x"]}]},
            "entry 0, a: steps is 'x'; it must be a whole number from 1",
        ),
        ({"entries": [{"model": "a", "steps": True}]}, "steps is True"),
        ({"entries": [{"model": "a", "guidance": math.nan}]}, "guidance is nan; it must be a finite number"),
        ({"entries": [{"model": "a", "seeds": -1}]}, "seeds is -1; it must be a whole number from 0"),
        ({"entries": [{"model": "a", "generate": {"x": {"y": 1}}}]}, "generate is .*; it must be names with plain"),
        ({"entries": [{"model": "a", "name": datetime.date(2024, 1, 1)}]}, "name is .*; it must be text"),
        ({"entries": [{"model": "a", 3: 1}]}, "has '3'; there are base"),
        ({"entries": [{"model": "a"}], "workers": "two"}, "workers of the board is 'two'; it must be a number"),
        (
            {"entries": [{"model": "a", "steps": [*range(1, 200)], "guidance": [*range(200)]}]},
            "more than 10,000 entries",
        ),
    ],
)
def test_a_wrong_board_is_refused_before_any_work(tree, match):
    with pytest.raises(ValueError, match=match):
        entries.list_entries(tree)


def test_files_that_are_no_board(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        entries.read_board(tmp_path / "absent.yaml")
    laughs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'ha'] * 9)}]\n" for i in range(9))
    for text, match in (
        ("a: [", "not YAML"),
        ("- 1", "must hold names with values"),
        (laughs, "aliases stand for more than"),
        ("a: &a [*a]", "an alias holds itself"),
        ("[" * 10_000, "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ):
        (tmp_path / "board.yaml").write_text(text)
        with pytest.raises(ValueError, match=match) as told:
            entries.read_board(tmp_path / "board.yaml")
        assert len(str(told.value)) < 1000
    (tmp_path / "board.yaml").unlink()
    os.mkfifo(tmp_path / "board.yaml")
    with pytest.raises(ValueError, match="not a regular file"):
        entries.read_board(tmp_path / "board.yaml")


def test_jobs_go_on_without_what_fails(tmp_path):
    """One fails, the one after it is left out; one kills itself once and is started again; the others are done."""
    mark = f"{tmp_path / 'mark'}"
    dies = f"import os, pathlib; p = pathlib.Path({mark!r}); n = p.exists(); p.touch(); n or os.kill(os.getpid(), 9)"
    todo = {
        "fails": Job("fails", ["-c", "raise SystemExit('error: no such model')"]),
        "needs": Job("needs", ["-c", f"open({mark + '2'!r}, 'w')"], ("fails",)),
        "dies": Job("dies", ["-c", dies]),
        "after": Job("after", ["-c", f"open({mark + '3'!r}, 'w')"], ("dies",)),
    }
    failed = run_jobs(todo, tmp_path, 1, patient=True)
    assert failed.keys() == {"fails", "needs"} and "error: no such model" in failed["fails"]
    assert failed["needs"] == "needs 'fails', which failed"
    assert not (tmp_path / "mark2").exists() and (tmp_path / "mark3").exists()
    with pytest.raises(JobFailure, match="killed by signal 9"):
        run_jobs({"dies": Job("dies", ["-c", "import os; os.kill(os.getpid(), 9)"])}, tmp_path, 1)
    always = {"dies": Job("dies", ["-c", f"open({mark + '4'!r}, 'a').write('x'); import os; os.kill(os.getpid(), 9)"])}
    assert "killed by signal 9" in run_jobs(always, tmp_path, 1, patient=True)["dies"]
    assert (tmp_path / "mark4").read_text() == "xxx", "three times, then it is a failure"


def test_jobs_say_how_far_they_are_without_a_terminal(tmp_path, capsys, monkeypatch):
    """A line at the start and the end of each with its time, in between the last line that it wrote."""
    monkeypatch.setattr(jobs, "LEAST", 0.1)
    talks = "import sys, time; print('half of it', flush=True); time.sleep(1.5)"
    todo = {"a": Job("talk", ["-c", talks]), "b": Job("fail", ["-c", "raise SystemExit(3)"], ("a",))}
    with pytest.raises(JobFailure, match="'fail' failed"):
        run_jobs(todo, tmp_path, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "talk ..." and lines[-2:] == ["fail ...", "fail: failed after 0 s"], lines
    assert re.fullmatch(r"talk, [12] s: half of it", lines[1]) and re.fullmatch(r"talk: done after [2-9] s", lines[-3])


@pytest.mark.parametrize("workers", (0, -1, 1.5, "2", True, None))
def test_jobs_need_a_worker(workers, tmp_path):
    with pytest.raises(ValueError, match="workers is .*; it must be a whole number, at least 1"):
        run_jobs({"a": Job("a", ["-c", ""])}, tmp_path / "out", workers)
    assert not (tmp_path / "out").exists()


def test_jobs_that_wait_for_each_other(tmp_path):
    for a, b in (("b", "a"), ("a", "a"), ("nowhere", "a")):
        todo = {"a": Job("one", ["-c", ""], (a,)), "b": Job("two", ["-c", ""], (b,))}
        with pytest.raises(ValueError, match="'one' depends on jobs that cannot finish or do not exist"):
            run_jobs(todo, tmp_path, 1)


STAGE = """
import json, os, pathlib, sys
given = {key: value for key, value in zip(sys.argv[2:], sys.argv[3:]) if key.startswith("--")}
out = pathlib.Path(given["--out"]); out.parent.mkdir(parents=True, exist_ok=True)
with open(os.environ["CALLS"], "a") as file: file.write(f"{sys.argv[1]} {out.parent.name}\\n")
if "broken" in str(out): raise SystemExit("error: broken does not load")
if sys.argv[1] == "score": out.write_text(os.environ["ROW"].replace("NAME", out.parent.name))
if sys.argv[1] == "score" and "partial" in str(out): raise SystemExit("error: it was scored without fid")
if "--cost" in given: pathlib.Path(given["--cost"]).write_text('{"latency": 0.5, "hardware": "CPU B"}')
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """The stages of a board as a script that writes down what it was called for."""
    (tmp_path / "stage.py").write_text(STAGE)
    monkeypatch.setenv("CALLS", f"{tmp_path / 'calls'}")
    monkeypatch.setenv("ROW", json.dumps([row("NAME", 12.0)]))
    real = entries.Job
    stage = lambda title, command, after=(): real(
        title, [f"{tmp_path / 'stage.py'}", command[1].split(".")[1], *command[2:]], after
    )
    monkeypatch.setattr(entries, "Job", lambda title, command, after=(): stage(title, _plain(command), after))
    return lambda: sorted((tmp_path / "calls").read_text().splitlines()) if (tmp_path / "calls").exists() else []


def _plain(command):
    return [word for word in command if word != "--overwrite"]


def test_a_board_skips_what_is_done_and_names_what_failed(stages, tmp_path):
    todo = entries.list_entries({"entries": [{"model": m, "seeds": [3]} for m in ("good", "broken", "fine")]})
    rows, failed = entries.evaluate_entries(todo, tmp_path / "out")
    assert [r["model"] for r in rows] == ["good-digits", "fine-digits"] and failed.keys() == {"broken-digits"}
    assert "error: broken does not load" in failed["broken-digits"]
    assert rows[0]["cost"]["latency"] == 0.5 and rows[0]["cost"]["nfe"] == 1, "measured goes over the manifest's"
    once = stages()
    assert len(once) == 7 and [c for c in once if "broken" in c] == ["generate broken-digits"]
    assert entries.evaluate_entries(todo, tmp_path / "out") == (rows, failed)
    assert stages() == sorted([*once, "generate broken-digits"]), "only the one that failed was tried again"
    rows_file = tmp_path / "out" / "entries" / "fine-digits" / "rows.json"
    for text, match in (
        ("[", "hold no list of rows"),
        (json.dumps([row("a", 1.0), row("b", 1.0)]), "rows of 2 models"),
    ):
        rows_file.write_text(text)
        some, why = entries.evaluate_entries(todo, tmp_path / "out")
        assert some == rows[:1] and match in why["fine-digits"], "the other entry has its row"
    listed = [
        {"model": "a", "name": "partial", "seeds": [3, 4]},
        {"model": "a", "name": "partial3", "seeds": [3, 4, 5]},
    ]
    partial = entries.list_entries({"entries": listed})
    some, why = entries.evaluate_entries(partial, tmp_path / "out")
    assert [r["model"] for r in some] == ["partial-digits"], (
        "its other metrics are kept; of some seeds alone nothing is"
    )
    assert len(why) == 2 and "scored without fid" in why["partial-digits"]
    again = entries.list_entries({"entries": [{"model": "good", "seeds": [3], "n": 5}]})
    entries.evaluate_entries(again, tmp_path / "out")
    assert stages().count("score good-digits") == 2, "another request is another row"


def test_the_mean_of_seeds():
    rows = [row("a", v, seeds=[i]) for i, v in enumerate((9.0, 10.0, 11.0))]
    (one,) = average_seeds([*rows])
    figure = one["metrics"]["fid"]
    assert figure["value"] == 10.0 and figure["n"] == 3 and one["seeds"] == [0, 1, 2]
    assert figure["high"] - 10.0 == pytest.approx(4.302653 / 3**0.5, rel=1e-5)  # Student's t of two degrees
    nested = [row("a", v + d, seeds=[j], run=i) for i, v in enumerate((9.0, 10.0, 11.0)) for j, d in ((0, -1), (1, 1))]
    (both,) = average_seeds(nested)
    assert both["metrics"]["fid"]["high"] == pytest.approx(figure["high"]) and both["metrics"]["fid"]["n"] == 6
    assert both["runs"] == [0, 1, 2] and type(both["cost"]["nfe"]) is int
    (single,) = average_seeds(nested[:2])
    assert "low" not in single["metrics"]["fid"], "noise seeds of one training run say nothing about another run"
    assert average_seeds([rows[0], row("b", 1.0)]) == [rows[0], row("b", 1.0)]
    assert average_seeds([*rows, rows[0]]) == [one], "the same row twice is one row"
    with pytest.raises(ValueError, match="a has two rows of seed 0"):
        average_seeds([*rows, row("a", 30.0, seeds=[0])])
    del rows[0]["metrics"]["fid"]
    figure = average_seeds(rows)[0]["metrics"]["fid"]
    assert figure["value"] == 10.5 and figure["n"] == 2, "of those that have it"


def test_cost(monkeypatch):
    """On a clock that only the calls move: a first call of a kind and the fifth are 100 times as slow."""
    from torch import nn

    class Pipe:
        components = {"unet": nn.Linear(3, 4), "vae": nn.Linear(9, 9), "scheduler": object()}

    assert parameters(Pipe()) == 16 and parameters(type("P", (), {"components": {"net": nn.Linear(2, 2)}})()) == 6
    seen = []
    clock = [0.0]
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def make(k):
        seen.append(k)
        clock[0] += {1: 0.25, 8: 0.5}[k] * (100 if seen.count(k) % 4 == 1 else 1)

    found = measure_cost(make, batch=8, seconds=20.0)
    assert seen == [1] * 5 + [8] * 5, "a first call is not counted; the slow fifth ends the 20 seconds"
    assert found["latency"] == 0.25 and found["images_per_second"] == 8 / 0.5 and found["batch"] == 8
    seen.clear()
    assert measure_cost(make, batch=1, seconds=0.0)["images_per_second"] == 4 and seen == [1] * 4
    assert found["peak_memory"] > 50 * 2**20 and "thread" in found["hardware"]
    with pytest.raises(ValueError, match="batch is 0"):
        measure_cost(lambda k: None, 0)


def test_figures_go_into_a_models_card(tmp_path):
    from huggingface_hub import ModelCard

    folder = tmp_path / "pipeline"
    folder.mkdir()
    facts = {"name": "dmd2", "base": "runs/teacher", "license": License("mit"), "family": "edm", "method": "dmd2"}
    made = Card(**facts, steps=1, config="a: 1", code="pipe = 1", task="unconditional-image-generation").render()
    (folder / "README.md").write_text(made)
    write_page(tmp_path / "board", [row("dmd2", 10.4), row("sid", 13.0)])
    write_card((tmp_path / "board" / "rows.json",), "dmd2", folder)
    first = (folder / "README.md").read_text()
    found = ModelCard(first).data
    assert [(r.metric_name, r.metric_value, r.dataset_name) for r in found.eval_results] == [
        ("FID", 10.4, "p [aa11], n = 2,000, extractor net e1, 1 step"),
        ("precision", pytest.approx(0.796), "p [aa11], n = 2,000, extractor net e1, 1 step"),
    ]
    assert found.model_name == "dmd2" and found.license == "mit" and python_block(first).endswith("pipe = 1")
    assert first.count("## Evaluation") == 1 and first.index("## Evaluation") < first.index("## What does not work")
    assert "| FID | 10.4 | p [aa11]" in first and "## Training" in first
    add_results(folder, [Result("p [aa11], n = 2,000, extractor net e1, 1 step", "FID", 9.0), Result("q", "KID", 0.5)])
    second = (folder / "README.md").read_text()
    assert [r.metric_value for r in ModelCard(second).data.eval_results] == [9.0, pytest.approx(0.796), 0.5]
    assert second.count("## Evaluation") == 1 and "10.4" not in second
    add_results(folder, [])
    assert (folder / "README.md").read_text() == second, "nothing new changes nothing"
    hostile = "a|b</td><script>[x](javascript:y)\n# z"
    add_results(folder, [Result(hostile, hostile, 1.0)])
    table = (folder / "README.md").read_text().split("## Evaluation")[1].split("## What")[0]
    assert r"| a\|b&lt;/td&gt;&lt;script&gt;[x\](javascript:y) # z | 1 |" in table
    last = ModelCard.load(folder / "README.md").data.eval_results[-1]
    assert last.metric_name == hostile and {line.replace(r"\|", "").count("|") for line in table.split("\n")} == {0, 4}
    with pytest.raises(ValueError, match="no row is of 'lcm'; there are \\['dmd2', 'sid'\\]"):
        write_card((tmp_path / "board" / "rows.json",), "lcm", folder)
    with pytest.raises(ValueError, match="no README.md"):
        add_results(tmp_path, [])
