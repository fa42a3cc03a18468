"""The image types, and the reader of images for training and evaluation. It needs only Pillow.

An image is converted to 8 bits, grey or RGB, and rotated upright. Values of 16 bits are divided by 257. Transparent
parts are placed on white. Of an animation the first frame is read. Of RGB with 16 bits a channel, Pillow keeps the high
byte.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import UnidentifiedImageError
from PIL.Image import Image, Transpose

# EPS runs Ghostscript. WMF needs Windows. The others are no pictures, or Pillow knows their names but not their pixels.
REFUSED = ("EPS", "WMF", "FITS", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC")
NAMED = 3  # files that a message names
HEADERS = 100_000  # images whose header is read before training; it takes some seconds
BITS = 258  # a TIFF tag
PHOTOMETRIC = 262  # a TIFF tag; 0 means inverted values
TEXTS = (".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".yaml", ".md")  # beside images
ORIENTATION = 0x112  # tag of EXIF
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE}
TURNS |= {6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}


class UnreadableImage(ValueError):
    """An image that cannot be read."""

    @property
    def in_training(self) -> ValueError:
        """The error of a run. Its remedy keeps the images' order, which random numbers depend on."""
        return ValueError(
            f"{self}: put a readable image into its place, then go on with --resume_from_checkpoint latest"
        )


@cache
def formats() -> list[str]:
    """Pillow's names of the formats that are read."""
    PIL.Image.init()
    return [name for name in PIL.Image.ID if name not in REFUSED]


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of all image types that this Pillow reads, in lower case."""
    known = {*formats(), "MPO"}  # Pillow opens .mpo as a JPEG
    return frozenset(suffix for suffix, name in PIL.Image.registered_extensions().items() if name in known)


def is_image(path: str | Path) -> bool:
    """Whether a file has the suffix of an image."""
    return _suffix(path) in suffixes()


def _suffix(path: str | Path) -> str:
    return os.path.splitext(path)[1].lower()


def is_hidden(name: str) -> bool:
    """Whether a name is hidden or made by the system: .name, ._name of macOS, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def files(folder: str | Path) -> list[Path]:
    """The visible files below a folder, sorted. Links to folders are followed; each folder is read once."""
    return [Path(path) for path in paths(folder)]


def paths(folder: str | Path) -> list[str]:
    """The paths of `files`, as strings. A link to a folder that holds `folder` is left out."""
    found: list[str] = []
    visited = {_identity(parent) for parent in Path(folder).resolve().parents}
    for where, folders, names in os.walk(Path(folder), onerror=_raise_unreadable_folder, followlinks=True):
        identity = _identity(where)
        if identity in visited:
            folders.clear()
            continue
        visited.add(identity)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        prefix = os.path.join(where, "").removeprefix(os.path.join(".", ""))
        found += [prefix + name for name in names if not is_hidden(name)]
    return sorted(found, key=lambda path: path.split(os.sep))  # the order of Path


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _raise_unreadable_folder(error: OSError) -> None:
    raise ValueError(f"the folder {error.filename} cannot be read: {error.strerror}") from None


def validate_headers(paths: Sequence[str | Path], remedy: str = "replace or remove them") -> None:
    """ValueError that names the first images whose header cannot be read. Pixels are not decoded.

    Of more than HEADERS images, as many at equal distances are opened.
    """
    some = paths[:: max(1, -(-len(paths) // HEADERS))]
    blocks = [some[i : i + 256] for i in range(0, len(some), 256)]
    with ThreadPoolExecutor(8) as threads:
        faults = [fault for faults in threads.map(_header_faults, blocks) for fault in faults]
    if faults:
        more = f" (and {len(faults) - NAMED:,} more)" if len(faults) > NAMED else ""
        raise ValueError("; ".join(faults[:NAMED]) + f"{more}: {remedy}")


def _header_faults(paths: Sequence[str | Path]) -> list[str]:
    """A message for each image whose header cannot be read."""
    faults = []
    for path in paths:
        try:
            _validate_file(path)
            PIL.Image.open(path, formats=formats()).close()
        except Exception as error:  # Pillow raises nearly every kind for hostile files
            faults.append(_describe_fault(str(path), error))
    return faults


def _validate_file(path: str | Path) -> None:
    if not os.path.isfile(path):
        raise UnreadableImage("there is no such file" if not os.path.exists(path) else "it is not a regular file")
    if not os.path.getsize(path):
        raise UnreadableImage("the file is empty")


def describe_unread(paths: Iterable[str | Path]) -> str:
    """A line with the number of files that are neither images nor text, by suffix; "" if there are none."""
    others = [path for path in paths if not is_image(path) and _suffix(path) not in TEXTS]
    return f"{format_file_count(others)} skipped, of types that are not read: {summary(others)}" if others else ""


def format_file_count(files: Sequence[object]) -> str:
    """The number of files in words: "1 file", "2 files"."""
    return f"{len(files):,} file{'s' * (len(files) != 1)}"


def summary(unread: Iterable[str | Path]) -> str:
    """Files by their suffixes, the most frequent first: ".heic (12), .mov (1)"."""
    counts = Counter(Path(path).suffix.lower() or "no suffix" for path in unread)
    return ", ".join(f"{suffix} ({n:,})" for suffix, n in counts.most_common(9))


def read(source: object, name: str | None = None) -> Image:
    """A Pillow image in mode "L" or "RGB", from a file, its bytes or an image of Pillow's.

    Raises UnreadableImage with `name`, by default the path, and the reason.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "")
    try:
        if isinstance(source, Image):
            return _picture(source)
        if isinstance(source, str | Path):
            _validate_file(source)
        if not isinstance(source, str | Path | bytes):
            raise UnreadableImage(f"it is of type {type(source).__name__}")
        with PIL.Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as image:
            return _picture(image)
    except Exception as error:  # Pillow raises nearly every kind for hostile files
        raise UnreadableImage(_describe_fault(name, error)) from None


def _describe_fault(name: str, error: Exception) -> str:
    reason = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "it is not an image, or its format is not supported"
    return f"image {name} cannot be read: {reason}"


def _picture(image: Image) -> Image:
    """The image upright, in "L" or "RGB"."""
    image.load()
    if image.mode == "F":
        raise UnreadableImage("its values are floats, and which one is white is unknown: save it with 8 or 16 bits")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode == "I" or image.mode.startswith("I;"):
        levels = _from_integers(image)
    elif image.has_transparency_data:
        levels = _composite_on_white(image).convert("L" if grey else "RGB")
    else:
        levels = image.convert("L" if grey else "RGB")
    return _apply_orientation(levels, image)


def _apply_orientation(levels: Image, image: Image) -> Image:
    """`levels` rotated according to the EXIF data of `image`."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF: the pixels are there, their orientation is not known
        turn = None
    return levels if turn is None else levels.transpose(turn)


def _from_integers(image: Image) -> Image:
    """A grey image of more than 8 bits, in "L"."""
    tags = getattr(image, "tag_v2", {})
    bits = min(16, tags.get(BITS, (16,))[0])
    white = 2**bits - 1
    values = np.asarray(image)
    low = values.min()
    high = values.max()
    if low < 0 or high > white:
        raise UnreadableImage(
            f"its values are {low} .. {high}, and which one is white is unknown: save it with 8 or 16 bits"
        )
    if image.mode == "I" and image.format not in ("PNG", "PPM") and 0 < high < 256:
        raise UnreadableImage(f"its 32 bits hold values up to {high}, which may be of 8 or 16 bits: save it with 8")
    table = np.rint(np.arange(white + 1) * (255 / white)).astype(np.uint8)
    levels = table[white - values if tags.get(PHOTOMETRIC) == 0 else values]
    if isinstance(clear := image.info.get("transparency"), int):
        levels[values == clear] = 255
    return PIL.Image.fromarray(levels)


def _composite_on_white(image: Image) -> Image:
    pixels = image.convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", pixels.size, "white"), pixels)
