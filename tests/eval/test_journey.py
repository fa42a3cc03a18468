"""docs/evaluation.md and docs/metrics.md, executed: a protocol and a metric of one's own, three students, a page."""

import glob
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from eval.features.extraction import features
from eval.features.extractors import load
from eval.protocol import Preparation
from eval.protocols import find_protocol
from pipelines.families import edm

DOCS = Path(__file__).parents[2] / "docs"
SHAPES = ("ellipse", "rectangle")


def section(page, title):
    """{language: content of the block} of a section; "" for commands."""
    text = (DOCS / page).read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S))


def execute(block, monkeypatch):
    """Run the lines `python -m MODULE ...` of a block in this process, with the shell's patterns."""
    for line in block.strip().splitlines():
        words = shlex.split(line, comments=True)
        assert words[:2] == ["python", "-m"], line
        flags = [name for word in words[3:] for name in (sorted(glob.glob(word)) or [word])]
        module = importlib.import_module(f"{words[2]}.__main__" if words[2].endswith("leaderboard") else words[2])
        monkeypatch.setattr(sys, "argv", [words[2], *flags])
        module.main()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with three one-step students of four classes, twelve photos of 20 x 16 pixels and a small DINOv2."""
    from transformers import Dinov2Config, Dinov2Model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_CACHE", "cache")
    for seed, method in enumerate(("dmd2", "sid", "cd")):
        torch.manual_seed(seed)
        folder = Path("runs", f"mine-{method}", "pipeline")
        edm.pipeline(edm.unet((8, 16), 32, 3, 4), 0.5, 80.0, 1).save_pretrained(folder)
        (folder / "distill.json").write_text(json.dumps({"student": True, "steps": 1}))
    Path("photos", "test").mkdir(parents=True)
    for i in range(12):
        image = Image.new("RGB", (20, 16))
        getattr(ImageDraw.Draw(image), SHAPES[i % 2])((2 + i % 4, 3, 12, 9 + i % 3), fill=("red", "blue")[i // 2 % 2])
        image.save(f"photos/test/{i}.png")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained("weights/dinov2")
    return tmp_path


def test_three_students_become_three_rows(workplace, monkeypatch, capsys):
    blocks = section("evaluation.md", "A protocol of your own")
    Path("mine.yaml").write_text(blocks["yaml"])
    execute(blocks[""], monkeypatch)
    rows = json.loads(Path("runs/mine.json").read_text())
    assert [row["model"] for row in rows] == ["mine-cd", "mine-dmd2", "mine-sid"]
    hashes = {row["protocol_hash"] for row in rows}
    assert hashes == {find_protocol("mine.yaml").hash} and {row["n"] for row in rows} == {40}
    assert all(list(row["metrics"]) == ["kid", "precision", "recall", "vendi"] for row in rows)
    assert len({row["metrics"]["kid"]["value"] for row in rows}) == 3
    page = Path("runs/report/index.html").read_text()
    assert page.count('<table class="sortable">') == 1 and "<h1>" in page and "Mine" in page
    assert all(
        f'<th scope="row" data-key="{name}">{name}</th>' in page for name in ("mine-dmd2", "mine-sid", "mine-cd")
    )
    manifest = json.loads(Path("runs/images/mine-sid/manifest.json").read_text())
    assert manifest["labels"] == [0, 1, 2, 3] * 10 and manifest["shape"] == [3, 32, 32]
    assert {file.suffix for file in Path("runs/report/paper").iterdir()} == {".csv", ".tex", ".svg", ".pdf"}
    assert "40 images of mine-sid, 1 network evaluation(s) each" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in Path("runs/images").rglob("*.png")}
    Path("own").mkdir()
    other = blocks["yaml"].replace("  - vendi\n", "").replace("photos/test", "../photos/test")
    Path("own", "mine.yaml").write_text(other)
    lines = [line.replace(" mine.yaml", " own/mine.yaml") for line in blocks[""].splitlines()[1:3]]
    lines += ["python -m eval.score --folder runs/images/mine-dmd2 --out runs/other.json"]
    lines += [
        "python -m eval.score --folder runs/images/mine-dmd2 --reference runs/images/mine-sid --out runs/sid.json"
    ]
    lines += ["python -m eval.leaderboard page runs/mine.json runs/other.json runs/sid.json --out runs/report"]
    execute("\n".join(lines), monkeypatch)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "the images of the same labels stay"
    for name in ("other", "sid"):
        (row,) = json.loads(Path(f"runs/{name}.json").read_text())
        assert row["protocol"] == "mine" and row["protocol_hash"] not in hashes
        hashes.add(row["protocol_hash"])
    assert Path("runs/report/index.html").read_text().count('<table class="sortable">') == 3


def test_a_metric_of_ones_own(workplace, monkeypatch):
    """The file of docs/metrics.md, against a loop over pairs."""
    blocks = section("metrics.md", "A metric of your own")
    Path("nearest.py").write_text(blocks["python"])
    draw = torch.Generator().manual_seed(0)
    for i in range(5):
        Path("runs/images/a").mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (16, 16, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(f"runs/images/a/{i}.png")
    execute(blocks[""].strip() + " --out runs/own.json", monkeypatch)
    (row,) = json.loads(Path("runs/own.json").read_text())
    assert list(row["metrics"]) == ["kid", "nearest"] and row["metrics"]["nearest"]["better"] == "lower"
    square = Preparation("square")
    fake, real = (features(path, load("dinov2:weights/dinov2"), square).rows() for path in ("runs/images/a", "photos"))
    nearest = sorted(min((a - b).norm().item() for b in real) for a in fake)
    assert row["metrics"]["nearest"]["value"] == pytest.approx(nearest[2], rel=1e-6)
