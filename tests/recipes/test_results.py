"""The leaderboard of the digits: which runs a method needs, and what they may cost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import Results, jobs, stages
from recipes.digits import TABLE


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """The jobs of methods of several runs, of which none is done; steps are those of a pass of one image."""
    monkeypatch.setattr(results, "passes", lambda config, steps: 64.0 * steps)
    return tmp_path, lambda *methods: jobs(Results(tmp_path, seeds=(0,), methods=methods, passes=64_000))


def test_runs_follow_those_that_they_start_from(planned):
    folder, plan = planned
    found = plan("disback", "phased", "tsm", "vsd")
    assert {name: set(job.after) for name, job in found.items()} == {
        "teacher-0": set(),
        "vsd-0": {"teacher-0"},
        **{f"{m}-0.1": {"teacher-0"} for m in ("disback", "phased", "tsm")},
        **{f"{m}-0": {"teacher-0", f"{m}-0.1"} for m in ("disback", "phased", "tsm")},
    }
    flag = lambda name, key: found[name].command[found[name].command.index(key) + 1]
    assert flag("disback-0", "--method.record") == f"{folder / 'disback-0.1'}"
    assert flag("phased-0", "--student.experts") == f"{folder / 'phased-0.1' / 'checkpoint-500'}"
    assert Path(flag("tsm-0", "--student.network")).is_dir()
    assert flag("tsm-0", "--method") == "sid" and flag("tsm-0.1", "--method") == "tsm"


def test_rows_of_other_methods_stay(tmp_path):
    """A checkout has the document and no runs: one method's rows are added, with the teachers that the others had."""
    row = lambda model, run, hash="a": {
        **{"model": model, "kind": "teacher" if model == "teacher" else "student", "run": run},
        **{"protocol_hash": hash, "n": 2000},
    }
    known = [row(model, run) for model in ("teacher", "sid", "vsd") for run in (0, 1)]
    new = [row("teacher", 0), row("vsd", 0)]
    cfg = Results(tmp_path, docs=tmp_path, methods=("vsd",))
    assert results.stored_rows(cfg, new) == []
    (tmp_path / "digits.json").write_text(json.dumps({"runs": known}))
    assert results.stored_rows(cfg, new) == [one for one in known if one["model"] != "vsd"]
    assert results.stored_rows(replace(cfg, methods=("vsd", "sid")), new) == []
    with pytest.raises(ValueError, match="rows of protocol_hash a, which differs here: train all methods anew"):
        results.stored_rows(cfg, [row("vsd", 0, "b")])


def test_students_of_parts_become_one(planned):
    folder, plan = planned
    found = plan("msd")
    assert set(found["msd-0"].after) == {"msd-0.1", "msd-0.2"} and found["msd-0.2"].after == ("teacher-0",)
    assert found["msd-0"].command[-1] == f"{folder / 'msd-0' / 'pipeline'}"
    for part in ("msd-0", "msd-0.1"):
        (folder / part / "pipeline").mkdir(parents=True)
        (folder / part / "pipeline" / "model_index.json").touch()
        assert part not in plan("msd")


def test_a_stage_of_its_own_length_leaves_the_rest_to_the_others():
    """Counted by real losses."""
    (record, steps), (back, rest) = stages("disback", 1_536_000)
    assert record.own and steps == TABLE[record.recipe].config.train.max_train_steps
    first = results.passes(TABLE[record.recipe].config, steps)
    assert first + results.passes(TABLE[back.recipe].config, rest) == pytest.approx(1_536_000, rel=0.001)
