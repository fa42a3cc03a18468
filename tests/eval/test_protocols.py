"""Protocols: complete, hashed, and clear about what they lack."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from eval.protocol import Measure, Preparation
from eval.protocols import PROTOCOLS, find_protocol


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
    with pytest.raises(ValueError, match="'coco'; the nearest is coco10k-dmd2; there are coco30k-gigagan, coco10k"):
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


OWN = """
name: shapes
size: 16
prompts: [a red circle, a blue square]
per_prompt: 3
seeds: [0, 7]
reference: photos
extractor: random:0:32
metrics: [kid, {metric: fid, extractor: random:1, resize: null}, patch_fid, dino_diversity]
"""


@pytest.fixture
def write_protocol(tmp_path):
    """A function that writes the file, with two real images beside it. Each edit replaces the line of its key."""
    (tmp_path / "photos").mkdir()
    for i in range(2):
        picture(20 + i, 16).save(tmp_path / "photos" / f"{i}.png")

    def write(*edits, name="own.yaml"):
        lines = {line.partition(":")[0]: line for line in (*OWN.strip().splitlines(), *edits)}
        (tmp_path / name).write_text("\n".join(lines.values()))
        return f"{tmp_path / name}"

    return write


def test_a_protocol_in_a_file(write_protocol, tmp_path):
    p = find_protocol(write_protocol())
    rule = Preparation("square", 16, "lanczos")
    assert (p.name, p.size, p.n, p.seeds, p.classes, p.reference_path) == (
        "shapes", 16, 6, (0, 7), None, tmp_path / "photos"
    )  # fmt: skip
    assert p.measures == (
        Measure("kid", "random:0:32", rule, rule),
        Measure("fid", "random:1", Preparation(), Preparation()),
        Measure("patch_fid", "random:0:32", Preparation(299), Preparation(299)),
        Measure("dino_diversity", "random:0:32", rule),
    )
    assert p.conditions() == ["a red circle"] * 3 + ["a blue square"] * 3 and p.missing() is None
    with pytest.raises(ValueError, match="2 prompts for 3 image.s. each; 7 images need more: lower n, or raise"):
        p.conditions(7)
    labels = write_protocol("labels: 4", "n: 6", "metrics: kid")
    text = "".join(line for line in open(labels) if not line.startswith(("prompts", "per_prompt")))
    (tmp_path / "labels.yaml").write_text(text)
    assert find_protocol(f"{tmp_path / 'labels.yaml'}").conditions() == [0, 1, 2, 3, 0, 1]
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    assert find_protocol(write_protocol("prompts: texts.txt", "per_prompt: 1")).conditions() == ["one", "two"]


def test_the_hash_of_a_file_is_of_its_content(write_protocol, tmp_path):
    """Prompts and real images count by their contents, not by their places; images depend on less than figures."""
    p = find_protocol(write_protocol())
    (tmp_path / "moved").mkdir()
    shutil.copytree(tmp_path / "photos", tmp_path / "moved" / "real")
    moved = find_protocol(write_protocol("reference: real", "notes: other", name="moved/own.yml"))
    assert moved.hash == p.hash and moved.sampling_hash == p.sampling_hash
    hashes = {p.hash}
    for edit in ("size: 8", "per_prompt: 2", "prompts: [a, b]", "seeds: 3", "metrics: [kid]", "resize: {filter: box}",
                 "extractor: random:2", "name: other", "n: 4"):  # fmt: skip
        changed = find_protocol(write_protocol(edit))
        assert changed.hash not in hashes, edit
        assert (changed.sampling_hash != p.sampling_hash) == (edit.split(":")[0] in ("size", "per_prompt", "prompts"))
        hashes.add(changed.hash)
    for text in ("a\nb\n", "a\nc\n"):
        (tmp_path / "texts.txt").write_text(text)
        changed = find_protocol(write_protocol("prompts: texts.txt"))
        assert changed.hash not in hashes
        hashes.add(changed.hash)
    picture(9, 9).save(tmp_path / "photos" / "1.png")
    assert find_protocol(write_protocol()).hash not in hashes
    digits = PROTOCOLS["digits"]
    photos = sorted((tmp_path / "photos").iterdir())
    assert digits.with_reference(tmp_path / "photos", photos).hash != digits.hash, "its real images are others"


def test_every_mistake_in_a_file_is_named(write_protocol, tmp_path):
    """In one message, with the nearest name."""
    wrong = write_protocol("sizes: 3", "size: big", "seeds: [1, 1]", "prompts: none.txt", "n: 0", "extractor: dinov3",
                "metrics: [kdi, {metric: fid, extractr: a}, kid, kid]", "resize: {fliter: box, crop: a}")  # fmt: skip
    with pytest.raises(ValueError) as caught:
        find_protocol(wrong)
    message = str(caught.value)
    for part in (
        f"protocol {tmp_path / 'own.yaml'}: ",
        "'sizes' is no key; the nearest is size; there are n, labels, per_prompt, size",
        "size is 'big'; it must be a number of pixels from 1 to 16,383",
        "seeds is [1, 1]; it must be different whole numbers from 0",
        "n is 0; it must be a whole number from 1 to 1,000,000",
        f"prompts is none.txt, but there is no file {tmp_path / 'none.txt'}",
        "extractor 'dinov3' is unknown; the nearest is dinov2; there are inception-clean",
        "there is no metric 'kdi'; the nearest is kid; there are fid, patch_fid",
        "metrics: 'extractr' is no key; the nearest is extractor",
        "metric kid is listed twice",
        "resize: 'fliter' is no key; the nearest is filter",
        "resize: crop is 'a'; it must be square, null or a number of pixels",
    ):
        assert message.count(part) == 1, part
    for edits, match in (
        (("labels: 4",), "labels and prompts: give one of labels, prompts"),
        (("metrics: [accuracy]",), "metric accuracy needs labels, and the protocol gives prompts"),
        (("n: 500", "metrics: [{metric: fid, extractor: inception-clean}]"), "500; fid of inception-clean needs 2,049"),
        (("name: digits",), "is called digits, as a published protocol: give it another name"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            find_protocol(write_protocol(*edits))
    (tmp_path / "list.yaml").write_text("- 1")
    for name, match in (("list", "must hold names with values"), ("none", "there is no protocol file .*none.yaml")):
        with pytest.raises(ValueError, match=match):
            find_protocol(f"{tmp_path / name}.yaml")
    absent = find_protocol(write_protocol("reference: elsewhere", "metrics: [kid]"))
    with pytest.raises(ValueError, match="there is no image below .*elsewhere; put it there"):
        absent.require()
    absent.require(reference=False)


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
