"""The picture of the README, from a folder like that of `make demo`."""

import json

from PIL import Image
from rows import figure, row

from benchmarks import picture

TEACHER = [row("teacher", 0, steps=n, nfe=2 * n - 1, kind="teacher") for n in (5, 9, 18)]


def test_it_shows_both_models_and_every_row(tmp_path):
    rows = [*TEACHER, row("dmd2", 0), row("real", 0, kind="real", steps=None)]
    for one, value in zip(rows, (100.0, 12.0, 10.5, 11.0, 10.0), strict=True):
        one["metrics"]["fd_heldout"] = figure(value)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for model, grey in (("teacher-35", 40), ("dmd2-1", 200)):
        (tmp_path / "samples" / model).mkdir(parents=True)
        for i in range(picture.ROWS * picture.COLUMNS):
            Image.new("L", (8, 8), grey).save(tmp_path / "samples" / model / f"{i:06d}.png")
    picture.main(picture.Picture(tmp_path, tmp_path / "docs" / "demo.png"))
    with Image.open(tmp_path / "docs" / "demo.png") as image:
        shown = image.convert("RGB")
    second = 2 * picture.PAD + picture.COLUMNS * (picture.TILE + picture.GAP)
    top = picture.PAD + picture.TITLE + 5
    for left, grey in ((picture.PAD + 5, 40), (second + 5, 200)):
        assert all(abs(channel - grey) < 20 for channel in shown.getpixel((left, top)))
    colours = {colour for _, colour in shown.getcolors(1 << 20)}
    assert any(red > 150 and blue < 60 for red, _, blue in colours), "the student's point"
