"""Images in one subfolder a class: their labels, the names of the classes, and what is wrong."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from distill.data.labels import Labels, read_class_images
from distill.method import Requirement
from distill.random import Draw

REAL = (Requirement.REAL,)


def png(level):
    file = io.BytesIO()
    Image.new("L", (4, 6), level).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three classes, the second without an image, and files that are not read."""
    files = {"cat/b.PNG": png(1), "cat/deep/a.png": png(2), "dog/x.png": png(4), "._fox/y.png": png(9)}
    files |= {"cat/.h.png": b"?", "cat/m.mov": b"?", "top.png": png(5), "names.txt": b"cat"}
    for name, content in files.items():
        path = tmp_path / "animals" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "animals" / "cow").mkdir()
    (tmp_path / "animals" / "cat" / "loop").symlink_to("..")
    return tmp_path / "animals"


def teacher(tmp_path, classes=4, **facts):
    """A teacher of gray pictures of 4 x 4 pixels, with a null class; facts: of its distill.json."""
    (tmp_path / "teacher").mkdir(exist_ok=True)
    (tmp_path / "teacher" / "distill.json").write_text(json.dumps(facts))
    net = SimpleNamespace(config=SimpleNamespace(num_class_embeds=classes + 1))
    denoiser = SimpleNamespace(net=net, null={})
    return SimpleNamespace(denoiser=denoiser, shape=(1, 4, 4), parts=SimpleNamespace(folder=tmp_path / "teacher"))


def test_images_by_class(folder):
    data = read_class_images(folder)
    assert data.names == ("cat", "cow", "dog") and data.counts[1:] == [0, 1]
    own = [(path.relative_to(folder).as_posix(), label) for path, label in zip(data.files, data.labels)]
    assert own == [("cat/b.PNG", 0), ("cat/deep/a.png", 0), ("dog/x.png", 2)]
    outside, unread, empty = data.notes
    assert "1 file outside of the classes skipped" in outside and ".mov" in unread and empty.endswith("label: cow")


@pytest.mark.parametrize("names, label", (((), 2), (("dog", "cat", "cow", "fox"), 0)), ids=("order", "names"))
def test_labels_of_a_teacher(folder, tmp_path, names, label, capsys):
    """A teacher that stores the names of its classes has their labels; another one has them in the folders' order."""
    data = Labels(f"{folder}", classes=(label,))
    data.validate(REAL)
    batch = data.open(teacher(tmp_path, class_names=names), REAL)(Draw(0, 0, "student", torch.arange(3)))
    assert batch["real_c"]["class_labels"].tolist() == [label] * 3
    torch.testing.assert_close(batch["real"], torch.full((3, 1, 4, 4), 4 / 127.5 - 1))
    assert (
        f"has 3 classes, the teacher 4: cat has label {0 if not names else 1}, dog {label}" in capsys.readouterr().err
    )


def test_mistakes(folder, tmp_path):
    def fails(message, data=None, classes=4, **facts):
        data = data or Labels(f"{folder}")
        with pytest.raises(ValueError, match=message):
            data.validate(REAL)
            data.open(teacher(tmp_path, classes, **facts), REAL)

    fails("animals has 3 classes, the teacher 2", classes=2)
    fails(
        "has the classes cow, which the teacher .* does not know; it knows dog, cat: rename", class_names=["dog", "cat"]
    )
    fails("animals has no images of --data.classes 1", Labels(f"{folder}", classes=(1,)))
    fails("no folder of images at '.*none'", Labels(f"{folder}/none"))
    fails("cow has no images in one subfolder a class", Labels(f"{folder}/cow"))
    fails("dog has no images .*; it has 1 file outside of subfolders: move", Labels(f"{folder}/dog"))
    (folder / "dog" / "y.png").write_bytes(b"not an image")
    (folder / "dog" / "z.png").symlink_to("gone.png")
    fails("image .*dog/y.png cannot be read: it is not an image, .*; image .*z.png .* no such file: replace or remove")
