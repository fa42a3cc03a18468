"""The one reader of images: the right levels for every kind of pixel, and what it refuses."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from distill.data import images
from distill.data.images import UnreadableImage, read

RAMP = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (2, 1))  # k * 257
INTEGERS = RAMP.astype(np.int32)
GREY, CLEAR = (9, 9, 9, 0), {"transparency": 0}


def stored(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def of(array, kind="PNG", **options):
    return stored(Image.fromarray(array), kind, **options)


def twelve_bits(*values):
    """A TIFF of one line with 12 bits a pixel, which Pillow itself does not write."""
    line = "".join(f"{v:03x}" for v in values)
    entries = {256: len(values), 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(line) // 2}
    data = bytes.fromhex(line)
    table = b"".join(k.to_bytes(2, "little") + b"\3\0\1\0\0\0" + v.to_bytes(4, "little") for k, v in entries.items())
    return b"II*\0" + (8 + len(data)).to_bytes(4, "little") + data + bytes([len(entries), 0]) + table + bytes(4)


@pytest.mark.parametrize(
    "file",
    (
        of(RAMP),
        of(RAMP, "TIFF"),
        of(RAMP, "JPEG2000", irreversible=False),
        of(INTEGERS, "PPM"),
        of(INTEGERS, "TIFF"),
        of(255 * 257 - RAMP, "TIFF", tiffinfo={262: 0}),
    ),
    ids=("png", "tif", "jp2", "pgm", "32 bits", "tif, white is 0"),
)
def test_sixteen_bits(file):
    """Value k * 257 becomes level k."""
    found = read(file)
    assert found.mode == "L" and (np.array(found) == np.arange(256)).all()


def test_twelve_bits():
    assert np.array(read(twelve_bits(0, 0x800, 0x7FF, 0xFFF))).tolist() == [[0, 128, 127, 255]]


@pytest.mark.parametrize(
    "file, level",
    (
        (stored(Image.new("RGBA", (2, 2), GREY)), (255,) * 3),
        (stored(Image.new("RGBA", (2, 2), (0, 0, 0, 51))), (204,) * 3),
        (stored(Image.new("LA", (2, 2), (9, 0))), 255),
        (stored(Image.new("L", (2, 2), 0), **CLEAR), 255),
        (stored(Image.new("I;16", (2, 2), 0), **CLEAR), 255),
        (stored(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)), (255,) * 3),
        (stored(Image.new("P", (2, 2), 0), **CLEAR), (255,) * 3),
        (stored(Image.new("P", (2, 2), 0), transparency=bytes([51] * 256)), (204,) * 3),
        (stored(Image.new("P", (2, 2), 0), "GIF", **CLEAR), (255,) * 3),
        (stored(Image.new("RGBA", (2, 2), GREY), "WEBP", lossless=True), (255,) * 3),
        (stored(Image.new("1", (2, 2), 1)), 255),
        (stored(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    ),
    ids="RGBA share LA L I16 RGB P share-of-P GIF WEBP 1 CMYK".split(),
)
def test_transparent_parts_lie_over_white(file, level):
    assert read(file).getpixel((0, 0)) == level


@pytest.mark.parametrize("kind", ("GIF", "PNG", "WEBP", "TIFF", "AVIF"))
def test_first_frame(kind):
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    r, g, b = read(stored(red, kind, save_all=True, append_images=[blue])).getpixel((4, 4))
    assert r > 250 and g < 5 and b < 5


@pytest.mark.parametrize("mode", ("RGB", "L", "I;16"))
def test_upright(mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: the left column is the top row
    image = Image.new(mode, (3, 2))
    image.putpixel((0, 0), (255, 255, 255) if mode == "RGB" else 65535 if mode == "I;16" else 255)
    found = np.array(read(stored(image, exif=exif.tobytes())))
    assert found.shape[:2] == (3, 2) and found[0, 1].min() == 255 and found[0, 0].max() == 0
    assert read(stored(image, exif=b"Exif\0\0no TIFF at all")).size == (3, 2)


@pytest.mark.parametrize(
    "file, why",
    (
        (of(RAMP.astype(np.float32) / 65535, "TIFF"), "its values are floats"),
        (of(INTEGERS * 9, "TIFF"), r"values are 0 \.\. 589815"),
        (of(INTEGERS - 9, "TIFF"), r"values are -9 \.\. "),
        (of(INTEGERS // 257, "TIFF"), "may be of 8 or 16 bits"),
        (of(RAMP)[:-30], "truncated|broken"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "not an image, or its format is not supported"),
        (b"", "not an image"),
    ),
    ids=("float", "beyond", "negative", "small integers", "torn", "eps", "empty"),
)
def test_refused(file, why):
    with pytest.raises(UnreadableImage, match=f"^image a.tif cannot be read: .*({why})"):
        read(file, "a.tif")


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("gone.png")
    for name, why in ("a.png", "not a regular file"), ("b.png", "no such file"), ("/dev/zero", "not a regular file"):
        with pytest.raises(UnreadableImage, match=why):
            read(tmp_path / name)


def test_files(tmp_path):
    """Visible files, links to folders followed once; suffixes of all that Pillow reads, in any case."""
    named = "a.PNG a.jpe a.jfif a.gif a.avif a.webp a.bmp a.tif a.tga a.jp2 a.mpo".split()
    other = "a.heic b.heic c.eps a.txt metadata.jsonl".split()
    for folder in ("real", ".hidden", "__MACOSX", "home"):
        (tmp_path / folder).mkdir()
    for name in (*named, *other, "._a.png"):
        (tmp_path / "real" / name).touch()
    (tmp_path / ".hidden" / "a.png").touch()
    (tmp_path / "__MACOSX" / "a.png").touch()
    (tmp_path / "home" / "link").symlink_to("../real")
    (tmp_path / "real" / "loop").symlink_to("../home")
    found = images.files(tmp_path / "home")
    assert {path.name for path in found if images.is_image(path)} == {*named} and len(found) == len(named) + len(other)
    assert images.describe_unread(found) == "3 files skipped, of types that are not read: .heic (2), .eps (1)"
    assert not images.describe_unread([path for path in found if path.suffix == ".gif"])


def test_evaluation_reads_as_training_does(tmp_path):
    from eval.features.extraction import _open_and_resize, list_images
    from eval.images.images import read_levels
    from eval.protocol import Preparation

    for name, image in (("a.tif", Image.fromarray(RAMP)), ("b.avif", Image.new("RGBA", (256, 2), GREY))):
        (tmp_path / name).write_bytes(stored(image, "TIFF" if name == "a.tif" else "AVIF"))
    grey, clear = list_images(tmp_path)
    assert (read_levels(grey).numpy() == np.arange(256)).all() and read_levels(clear).min() > 250
    assert (_open_and_resize(grey, Preparation(), "")[1] == np.arange(256)).all() and _open_and_resize(
        clear, Preparation(), ""
    )[1].min() > 250
