"""Protocols: complete, hashed, and clear about what they lack."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from eval.protocols import PROTOCOLS, Measure, Preparation, find_protocol


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """The data of protocols, empty at first."""
    monkeypatch.setenv("DISTILL_DATA", f"{tmp_path / 'data'}")
    return tmp_path / "data"


def fill(data, name, captions):
    folder = data / PROTOCOLS[name].data
    (folder / "reference").mkdir(parents=True)
    (folder / "prompts.txt").write_text("".join(f"{text}\n" for text in captions))
    return folder


def test_every_protocol_is_there_under_its_name():
    published = ("coco30k-gigagan", "coco10k-dmd2", "mjhq30k", "imagenet64-edm", "cifar10-edm", "digits")
    assert {*published, "coco10k-dmd2-tokenizer1"} == PROTOCOLS.keys()
    for name, p in PROTOCOLS.items():
        assert find_protocol(name) is p and p.name == name and p.n and p.measures and p.seeds and p.notes and p.source
        assert (p.classes is None) == bool(p.prompts)  # either prompts, or labels
    with pytest.raises(ValueError, match="no protocol 'coco'; there are coco30k-gigagan, coco10k-dmd2"):
        find_protocol("coco")


def test_the_hash_is_of_everything_but_the_notes():
    hashes = [p.hash for p in PROTOCOLS.values()]
    assert len({*hashes}) == len(hashes) and all(len(h) == 16 for h in hashes)
    p = PROTOCOLS["coco30k-gigagan"]
    assert replace(p, notes="other").hash == replace(p).hash == p.hash
    for change in (
        {"n": 10_000},
        {"seeds": (1,)},
        {"size": 256},
        {"classes": 10},
        {"components": (("a", "b"),)},
        {"reference": "other"},
        {"measures": (Measure("fid", "inception-clean", Preparation("square", 256, "bicubic")),)},
    ):
        assert replace(p, **change).hash != p.hash, change


def test_the_published_facts():
    """What their authors' code does, from which a figure would silently move."""
    fid, clip = PROTOCOLS["coco30k-gigagan"].measures
    assert (fid.generated, fid.reference) == (Preparation("square", 256, "lanczos"),) * 2
    assert clip.extractor == "open_clip:ViT-g-14/laion2b_s12b_b42k" and clip.text == "A photo depicts"
    fid, patch, _ = PROTOCOLS["coco10k-dmd2"].measures
    assert fid.generated.size == 512 and patch.generated == Preparation(crop=299)
    one, two = PROTOCOLS["coco10k-dmd2"], PROTOCOLS["coco10k-dmd2-tokenizer1"]
    assert two.components == (("tokenizer_2", "tokenizer"),) and one.hash != two.hash
    assert replace(two, name=one.name, components=()).hash == one.hash  # nothing else differs
    assert PROTOCOLS["imagenet64-edm"].conditions(1001) == [*range(1000), 0]


def test_what_is_missing_is_said(data):
    for name, p in PROTOCOLS.items():
        told = p.missing()
        if name == "digits":
            assert told is None
            continue
        assert name in told and str(p.reference_path) in told
        assert (str(p.folder / "prompts.txt") in told) == (p.classes is None)
        with pytest.raises(ValueError, match="lacks data"):
            p.require()
    p, folder = PROTOCOLS["coco30k-gigagan"], fill(data, "coco30k-gigagan", ["a fox", "a cat"])
    assert "prompts.txt" not in p.missing() and "reference" in p.missing()  # an empty folder is no reference
    assert p.missing(reference=False) is None
    Image.new("RGB", (8, 8)).save(folder / "reference" / "a.jpg")
    assert p.missing() is None
    assert p.conditions(2) == ["a fox", "a cat"]
    with pytest.raises(ValueError, match="holds 2 prompts; protocol coco30k-gigagan needs 30000"):
        p.conditions()
    statistics = PROTOCOLS["cifar10-edm"]
    statistics.reference_path.parent.mkdir(parents=True)
    np.savez(statistics.reference_path, mu=np.zeros(1))
    assert statistics.missing() is None


def picture(width, height):
    """Every pixel is its own place: red is the column, green the row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_images_are_prepared_as_told():
    wide = picture(20, 11)
    assert Preparation()(wide) is wide
    square = np.asarray(Preparation("square")(wide))
    assert square.shape == (11, 11, 3) and square[0, 0].tolist() == [4, 0, 0] and square[-1, -1].tolist() == [14, 10, 0]
    patch = np.asarray(Preparation(crop=6)(wide))
    assert patch.shape == (6, 6, 3) and patch[0, 0].tolist() == [7, 2, 0]
    assert Preparation(crop=12)(wide).size == (20, 11)  # smaller on a side: whole
    expected = Image.fromarray(square).resize((5, 5), Image.Resampling.LANCZOS)
    assert Preparation("square", 5)(wide).tobytes() == expected.tobytes()
    assert Preparation("square", 5, "box")(wide).tobytes() != expected.tobytes()
    assert Preparation("square", 11)(picture(11, 11)).tobytes() == picture(11, 11).tobytes()
