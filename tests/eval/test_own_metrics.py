"""Metrics of Python files, and the colour of images against a teacher's of the same noise."""

import json

import numpy as np
import pytest
import torch

from eval.figures import score_folder
from eval.images import images as folders
from eval.leaderboard.page import build_html_page
from eval.leaderboard.tables import columns, group_boards
from eval.metrics.colour import colour_values, drift, lab
from eval.metrics.lookup import find_metric
from eval.protocols import find_protocol

OWN = """
BETTER = "higher"

def compute(inputs):
    return [inputs.picture(i).mean().item() for i in range(inputs.count)]
"""


@pytest.fixture
def images(tmp_path):
    """Eight images of four labels, and others of the same seed and of another one."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(8, 3, 8, 8, generator=draw) * 1.6 - 0.8
    labels = torch.arange(8) % 4
    folders.write_folder(tmp_path / "teacher", pixels, labels, seed=5, name="teacher")
    folders.write_folder(tmp_path / "student", pixels * 1.25, labels, seed=5, name="student")
    folders.write_folder(tmp_path / "other", pixels, labels, seed=6, name="other")
    return pixels


def test_a_metric_in_a_file(images, tmp_path):
    """A value of each image gives the mean and its interval; its content is part of the hash."""
    own = tmp_path / "brightness.py"
    own.write_text(OWN)
    row = score_folder(tmp_path / "student", metrics=(f"{own}",))
    figure = row["metrics"]["brightness"]
    values = folders.read_folder(tmp_path / "student")[0].double().mean((1, 2, 3))
    assert figure["value"] == pytest.approx(values.mean().item(), abs=1e-6) and figure["low"] < figure["value"]
    assert (figure["n"], figure["better"], row["extractor"]) == (8, "higher", "")
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "brightness.py").write_text(OWN)
    moved = score_folder(tmp_path / "student", metrics=(f"{tmp_path / 'moved' / 'brightness.py'}",))
    assert moved["protocol_hash"] == row["protocol_hash"], "its place does not count"
    own.write_text(OWN + "\n# another\n")
    assert score_folder(tmp_path / "student", metrics=(f"{own}",))["protocol_hash"] != row["protocol_hash"]
    plan = tmp_path / "own.yaml"
    plan.write_text("size: 8\nlabels: 4\nmetrics: [brightness.py, both.py, vendi]\nextractor: random\n")
    (tmp_path / "both.py").write_text(
        'BETTER = "lower"\nEXTRACTOR = "random"\nNEEDS = ("labels",)\n\ndef compute(inputs):\n'
        '    return {"mean": inputs.fake.rows().mean(), "labels": float(inputs.labels.max())}\n'
    )
    row = score_folder(tmp_path / "student", f"{plan}")
    assert list(row["metrics"]) == ["brightness", "both_mean", "both_labels", "vendi"]
    assert row["metrics"]["both_labels"] == {"value": 3.0, "low": 3.0, "high": 3.0, "n": 8, "better": "lower"}
    board = group_boards([row, row | {"model": "b"}])[0]
    assert [board.better(name) for name in board.metrics] == ["higher", "lower", "lower", "higher"]
    before = find_protocol(f"{plan}").hash
    own.write_text(OWN)
    assert find_protocol(f"{plan}").hash != before


@pytest.mark.parametrize(
    "text, match",
    [
        ("x = 1", "there is no function compute.inputs.; BETTER is None; it must be lower, higher or neither"),
        (OWN + "NEEDS = ('label',)", "NEEDS has 'label'; the nearest is labels; there are reference, labels"),
        (OWN + "NEEDS = ('reference',)", "whose features need an EXTRACTOR, for example dinov2 or clip"),
        (OWN + "EXTRACTOR = 'dino'", "EXTRACTOR is 'dino'; the nearest is dinov2; there are pixels, inception-clean"),
        (OWN + "LEAST = 0", "LEAST is 0; it must be a whole number from 1"),
        ("1 / 0", "own.py cannot be loaded: ZeroDivisionError: division by zero"),
        ("def compute(", "own.py cannot be loaded: SyntaxError"),
        (OWN.replace("in range(inputs.count)", "in range(3)"), r"shape \[3\]; a number or \[8\] is needed"),
        (OWN.replace(".mean()", ".mode()"), "own.py: "),
    ],
)
def test_a_wrong_file_is_named(text, match, images, tmp_path):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ValueError, match=match):
        score_folder(tmp_path / "student", metrics=(f"{tmp_path / 'own.py'}",))
    with pytest.raises(ValueError, match="there is no file none.py of a metric"):
        find_metric("none.py")


def test_colours_by_hand():
    """Known CIELAB values of sRGB; grey has no chroma; spreads and means are those of the levels."""
    flat = lambda *levels: (torch.tensor(levels).double() / 127.5 - 1)[None, :, None, None].expand(1, 3, 2, 2)
    known = {(255, 0, 0): (53.24, 80.09, 67.20), (255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0)}
    for levels, expected in known.items():
        assert lab(flat(*levels))[:, 0, 0].tolist() == pytest.approx(expected, abs=0.02)
    values = colour_values(flat(255, 0, 0)).tolist()
    assert values[0] == pytest.approx(np.hypot(80.09, 67.20), abs=0.02) and values[1:] == pytest.approx(
        [0, 255, 0, 0, 0, 0, 0], abs=1e-9
    )
    grey = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
    values = colour_values(grey)
    assert values[0] < 0.02 and values[1] > 25 and values[5].item() == pytest.approx(np.linspace(0, 255, 16).std())
    shift = drift(lambda i: grey * 0.5, lambda i: grey, 2)
    assert shift["red_spread_drift"].value == pytest.approx(-np.linspace(0, 255, 16).std() / 2)
    assert shift["contrast_drift"].value < -10 and abs(shift["green_mean_drift"].value) < 1e-9
    with pytest.raises(ValueError, match="image 0 and the teacher's are 4 x 4 and 2 x 2 pixels; drift needs one size"):
        drift(lambda i: grey, lambda i: flat(0, 0, 0), 1)


def test_drift_from_the_teacher(images, tmp_path):
    """Columns without ranks, from the folder of the same seed; another teacher is another table."""
    how = {"metrics": ("colour",), "teacher": (tmp_path / "other", tmp_path / "teacher")}
    rows = [score_folder(tmp_path / name, **how) for name in ("student", "teacher")]
    student, teacher = (row["metrics"] for row in rows)
    assert list(student)[:4] == ["chroma", "contrast", "chroma_drift", "contrast_drift"] and len(student) == 10
    assert student["chroma_drift"]["value"] == pytest.approx(student["chroma"]["value"] - teacher["chroma"]["value"])
    assert student["chroma_drift"]["low"] > 0 and student["blue_spread_drift"]["value"] > 5, "it is more saturated"
    assert all(teacher[name]["value"] == 0 for name in teacher if name.endswith("_drift"))
    assert {figure["better"] for figure in student.values()} == {"neither"}
    (board,) = group_boards(rows)
    assert not any(cell.rank for name in board.metrics for cell in columns(board)[name])
    page = build_html_page(json.loads(json.dumps(rows)))
    assert "is better</i>" not in page and "chroma drift" in page and "no figure says which model is better" in page
    lone = score_folder(tmp_path / "student", metrics=("colour",))
    assert lone["protocol_hash"] != rows[0]["protocol_hash"] and "chroma_drift" not in lone["metrics"]
    with pytest.raises(ValueError, match="has the 8 prompts or labels and the seed 5 of .*student: generate one with"):
        score_folder(tmp_path / "student", metrics=("colour",), teacher=(tmp_path / "other",))
    with pytest.raises(ValueError, match="has no teacher's images with its prompts and noise .--teacher., which drift"):
        score_folder(tmp_path / "student", metrics=("drift",))
