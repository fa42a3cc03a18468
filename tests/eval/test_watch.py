"""A checkpoint is chosen on one split and measured on another that shares no noise, prompt or real image with it."""

import json

import pytest
import torch
from rows import figure, row
from test_leaderboard import _plain

from eval.images import images as folders
from eval.leaderboard import select_checkpoint as module
from eval.leaderboard.select_checkpoint import SEED, best_row, make_splits, select_checkpoint
from eval.protocol import Measure, Protocol
from eval.protocols import find_protocol
from pipelines.export.card import Card
from pipelines.export.license import License

STAGE = """
import json, os, pathlib, sys
stage, words = sys.argv[1], sys.argv[2:]
key, given = "", {w[2:]: [] for w in words if w.startswith("--")}
for word in words: key = word[2:] if word.startswith("--") else key; given.get(key, []).append(word)
given = {k: [w for w in v if not w.startswith("--")] for k, v in given.items()}
with open(os.environ["CALLS"], "a") as file: file.write(" ".join([stage, *words]) + "\\n")
if stage == "export":
    out = pathlib.Path(given["output_dir"][-1]); out.mkdir(parents=True)
    if given["checkpoint"] == ["checkpoint-3"]: raise SystemExit("error: checkpoint-3 is broken")
    (out / "model_index.json").write_text("{}"); (out / "README.md").write_text(os.environ["CARD"])
if stage == "score":
    out = pathlib.Path(given["out"][0]); step = int(out.parent.name.split("-")[1])
    fid = {1: 30.0, 2: 10.0, 4: 20.0, 3: 1.0}[step] + (5.0 if out.stem == "test" else 0.0)
    found = json.loads(os.environ["ROW"])
    out.write_text(json.dumps([{**found, "metrics": {"fd_train": {"value": fid, "n": 9}}} for _ in given["folder"]]))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of four checkpoints, the third broken, whose stages write down what they were called for."""
    folder = tmp_path / "run"
    for step in (1, 2, 3, 4):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "state.json").write_text(json.dumps({"step": step}))
    (folder / "config.yaml").write_text("# DMD2\n")
    (tmp_path / "stage.py").write_text(STAGE)
    facts = {"name": "run", "base": "teacher", "license": License("mit"), "family": "edm", "method": "dmd2"}
    text = Card(**facts, steps=1, config="a: 1", code="pipe = 1", task="unconditional-image-generation").render()
    for key, value in (("CALLS", f"{tmp_path / 'calls'}"), ("CARD", text), ("ROW", json.dumps(row("x", 1.0)))):
        monkeypatch.setenv(key, value)
    real = module.Job
    stage = lambda command: [f"{tmp_path / 'stage.py'}", command[1].split(".")[1], *_plain(command[2:])]
    monkeypatch.setattr(module, "Job", lambda title, command, after=(): real(title, stage(command), after))
    return folder


def test_the_best_of_the_selection_is_tested(run, tmp_path):
    calls = lambda: (tmp_path / "calls").read_text().splitlines()
    with pytest.raises(ValueError, match="1 steps failed.*checkpoint-3 is broken"):
        select_checkpoint(run, n=100)
    facts = json.loads((run / "watch" / "watch.json").read_text())
    assert facts["chosen"] == "checkpoint-2" and facts["by"] == "fd_train" and facts["ties"] == []
    assert [r["model"] for r in facts["selection"]] == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    assert facts["test"]["metrics"]["fd_train"]["value"] == 15.0, "not the 10 that it was chosen by"
    scored = [c for c in calls() if c.startswith("score")]
    assert sum("/test.json" in c for c in scored) == 1 and "checkpoint-2/test.json" in scored[-1]
    assert all("--metrics fd_train" in c for c in scored[:-1]) and "--metrics fd_heldout accuracy" in scored[-1]
    seeds = {c.split("--seed ")[1].split()[0] for c in calls() if "/selection-" in c and c.startswith("generate")}
    tests = {c.split("--seed ")[1].split()[0] for c in calls() if "/test-" in c and c.startswith("generate")}
    assert seeds == {str(SEED)} and tests == {"0", "1", "2"}
    assert [f.parent.name for f in run.glob("watch/*/pipeline")] == ["checkpoint-2"], "the others' exports are gone"
    text = (run / "watch" / "checkpoint-2" / "pipeline" / "README.md").read_text()
    assert "| FD train | 15 | p, test" in text and "value: 15.0" in text
    page = (run / "watch" / "index.html").read_text()
    assert page.count('<table class="sortable">') == 2 and "p, selection" in page and "checkpoint-3 is broken" in page

    (run / "watch" / "checkpoint-2" / "test.json").write_text(json.dumps([facts["test"]]))  # one seed: it was killed
    once = len(calls())
    with pytest.raises(ValueError, match="checkpoint-3 is broken"):
        select_checkpoint(run, n=100)
    assert sum(c.startswith("score") and "test.json" in c for c in calls()[once:]) == 1

    once = len(calls())
    with pytest.raises(ValueError, match="checkpoint-3 is broken"):
        select_checkpoint(run, n=100)
    assert calls()[once:] == [c for c in calls()[once:] if "checkpoint-3" in c] != [], "what is scored is kept"
    with pytest.raises(ValueError, match="checkpoint-3"):
        select_checkpoint(run, n=50)
    assert sum(c.startswith("score") for c in calls()) == 2 * len(scored) + 1, "another request is scored anew"


def test_it_follows_a_run_to_its_end(run, monkeypatch):
    """A checkpoint that appears while it waits is scored too; the exported pipeline is the run's end."""
    for step in (3, 4):
        (run / f"checkpoint-{step}" / "state.json").unlink()

    def later(seconds):
        assert seconds == 5
        (run / "checkpoint-4" / "state.json").write_text('{"step": 4}')
        (run / "pipeline").mkdir()
        (run / "pipeline" / "model_index.json").write_text("{}")

    monkeypatch.setattr(module.time, "sleep", later)
    assert select_checkpoint(run, follow=True, every=5) == run / "watch" / "index.html"
    facts = json.loads((run / "watch" / "watch.json").read_text())
    assert [r["model"] for r in facts["selection"]] == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]


def test_best_of_rows():
    rows = [
        row(m, 0.0) | {"metrics": {"fid": figure(v, h)}} for m, v, h in (("a", 9.0, 1), ("b", 8.5, 1), ("c", 20, 1))
    ]
    assert best_row(rows)[0]["model"] == "b" and best_row(rows)[1] == ["a"]
    more = [r | {"metrics": {"clip_score": r["metrics"]["fid"]}} for r in rows]
    assert best_row(more)[0]["model"] == "c" and best_row(more)[1] == []


def test_splits_share_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_DATA", f"{tmp_path / 'data'}")
    p = Protocol("p", "p", 6, 8, (Measure("fid", "digits"), Measure("clip_score", "digits")), reference="real")
    (tmp_path / "data" / "p").mkdir(parents=True)
    (tmp_path / "data" / "p" / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(6)))
    folders.write_folder(tmp_path / "data" / "p" / "real", torch.rand(6, 1, 8, 8))
    select, test = make_splits(p, tmp_path / "out", None, 2, None)
    assert set(select.seeds).isdisjoint(test.seeds) and select.score["metrics"] == ["fid"]
    assert select.generate["n"] == 2 and test.score["metrics"] == ["fid", "clip_score"]
    texts = [{json.loads(line)["text"] for line in open(s.generate["prompts"])} for s in (select, test)]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 6
    real = [{file.resolve() for file in s.score["reference"].glob("*.png")} for s in (select, test)]
    assert not real[0] & real[1] and len(real[0] | real[1]) == 6
    own = tmp_path / "own.yaml"
    own.write_text("size: 8\nprompts: [a, b, c]\nper_prompt: 2\nmetrics: [kid, vendi]\nextractor: random\n")
    halves = make_splits(find_protocol(f"{own}"), tmp_path / "own", None, None, tmp_path / "data" / "p" / "real")
    texts = [[json.loads(line)["text"] for line in open(s.generate["prompts"])] for s in halves]
    real = [{file.resolve() for file in s.score["reference"].glob("*.png")} for s in halves]
    assert texts == [["b"], ["a", "c"]] and not real[0] & real[1] and len(real[0] | real[1]) == 6
    assert all(s.score["protocol"] == f"{own}" and s.generate["per_prompt"] == 2 for s in halves)
    with pytest.raises(ValueError, match="has no reference, which kid needs: name a folder by --reference"):
        make_splits(find_protocol(f"{own}"), tmp_path / "own", None, None, None)
    with pytest.raises(ValueError, match="own.yaml; it must be a folder of real images, half for each split"):
        make_splits(find_protocol(f"{own}"), tmp_path / "own", None, None, own)
    held, other = make_splits(find_protocol("digits"), tmp_path, None, None, None)
    assert held.score["metrics"] == ["fd_train"] and "fd_train" not in other.score["metrics"]


def test_what_cannot_be_split_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_DATA", f"{tmp_path}")
    with pytest.raises(ValueError, match="no run at"):
        select_checkpoint(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="has no checkpoint-N"):
        select_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="metric is fd_heldout; on the digits fd_train or accuracy may select"):
        select_checkpoint(tmp_path, metric="fd_heldout")
    with pytest.raises(ValueError, match="the digits have two sets of real images; leave it out"):
        make_splits(find_protocol("digits"), tmp_path, None, None, tmp_path)
    with pytest.raises(ValueError, match="protocol cifar10-edm measures fid"):
        make_splits(find_protocol("cifar10-edm"), tmp_path, "kid", None, None)
    with pytest.raises(ValueError, match="lacks data"):
        make_splits(find_protocol("cifar10-edm"), tmp_path, None, None, None)
    (tmp_path / "cifar10-edm").mkdir()
    (tmp_path / "cifar10-edm" / "cifar10-32x32.npz").touch()
    with pytest.raises(ValueError, match="is statistics, which cannot be halved: pass --reference"):
        make_splits(find_protocol("cifar10-edm"), tmp_path, None, None, None)
    select, test = make_splits(find_protocol("cifar10-edm"), tmp_path, None, None, tmp_path / "photos")
    assert select.score["reference"] == tmp_path / "photos" and "reference" not in test.score
