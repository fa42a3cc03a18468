"""What each extractor needs: its package and its weights. The download of Inception. It imports no network."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eval.files import list_names

if TYPE_CHECKING:
    from torch import nn

INCEPTION = "inception-2015-12-05.pt"  # Karras et al., the TorchScript file that clean-fid fetches
HPS = "HPS_v2.1_compressed.safetensors"  # the authors' checkpoint, stored as safetensors
DINO = "facebook/dinov2-large"
CLIP = "openai/clip-vit-large-patch14-336"
PICKSCORE = "yuvalkirstain/PickScore_v1"
SECONDS = 10.0  # that a server may be silent


def cache_folder() -> Path:
    """The folder of weights and features: $DISTILL_CACHE, by default runs/cache below the current folder."""
    return Path(os.environ.get("DISTILL_CACHE", "runs/cache"))


def weights_hash(net: nn.Module) -> str:
    """The first 12 hex digits of the SHA-256 of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def require_extractor(spec: str) -> None:
    """ValueError if the name is unknown, or if the package or the weights of an extractor are missing.

    The file of Inception is downloaded if it is absent.
    """
    name, _, weights = spec.partition(":")
    if name not in NEEDS:
        raise ValueError(f"extractor {name!r} is unknown; {list_names(name, EXTRACTOR_NAMES)}")
    NEEDS[name](weights)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def fetch_inception() -> Path:
    """The file of Inception in the cache folder. If it is absent, clean-fid downloads it.

    ValueError, with the public address and the place of the file, if there is no network.
    """
    path = cache_folder() / INCEPTION
    if path.is_file():
        return path
    from cleanfid import downloads_helper as clean_fid

    if is_offline():
        reason = "HF_HUB_OFFLINE forbids downloads"
    else:
        sys.stderr.write(f"fetching {clean_fid.inception_url}\n")
        try:
            return _download(clean_fid.check_download_inception, path)
        except (OSError, ValueError) as error:
            reason = f"it could not be fetched ({error})"
    raise ValueError(
        f"there is no file {path}, and {reason}; download {clean_fid.inception_url} where there is a network and put "
        "it there, or name a file by --use inception-clean=inception-clean:PATH"
    )


def _download(fetch: Callable[[str], str], path: Path) -> Path:
    """Move what `fetch(folder)` writes to `path`. OSError for a silent server, ValueError for a truncated file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(fetch(folder))
            if not zipfile.is_zipfile(part):
                raise ValueError("what came is not the complete file")
            part.replace(path)
    finally:
        socket.setdefaulttimeout(before)
    return path


def _require_inception(weights: str) -> None:
    if not weights:
        fetch_inception()
    elif not Path(weights).is_file():
        raise ValueError(f"there is no file {weights}; name the TorchScript file {INCEPTION} of Inception")


def _require_package(name: str, package: str, extra: str, weights: str = "") -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"extractor {name} needs the package {package}: pip install 'distill-one-step[{extra}]'")


def _require_repository(name: str, default: str, weights: str) -> None:
    """ValueError for a name on the Hub that is not in its cache, if downloads are forbidden."""
    from huggingface_hub import try_to_load_from_cache

    where = weights or default
    if Path(where).is_dir() or not is_offline():
        return
    if not (where.count("/") == 1 and isinstance(try_to_load_from_cache(where, "config.json"), str)):
        raise ValueError(
            f"extractor {name} needs {where!r}, which is no folder here, and HF_HUB_OFFLINE forbids downloads; fetch "
            f"it where there is a network (hf download {where}), and name its folder by {name}:FOLDER"
        )


def _require_open_clip(weights: str) -> None:
    _require_package("open_clip", "open_clip", "eval")
    kind, _, folder = weights.partition("local-dir:")
    if not kind and folder and not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}; name one by open_clip:local-dir:FOLDER")


def require_hps(weights: str = "") -> Path:
    """The file of HPS. ValueError if it is absent."""
    path = Path(weights) if weights else cache_folder() / HPS
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; hpsv2 needs the weights of xswu/HPSv2 as safetensors (see "
            f"docs/metrics.md): put them there, or name the file by hpsv2:PATH"
        )
    return path


def _require_hpsv2(weights: str) -> None:
    _require_package("hpsv2", "open_clip", "eval")
    require_hps(weights)


def _require_nothing(weights: str) -> None:
    """The network is built here; `load` checks its arguments."""


NEEDS: dict[str, Callable[[str], None]] = {
    **dict.fromkeys(("inception-clean", "inception-legacy", "inception-logits"), _require_inception),
    "dinov2": partial(_require_repository, "dinov2", DINO),
    "clip": partial(_require_repository, "clip", CLIP),
    "open_clip": _require_open_clip,
    "hpsv2": _require_hpsv2,
    "pickscore": partial(_require_repository, "pickscore", PICKSCORE),
    "digits": _require_nothing,
    "random": _require_nothing,
    "lpips": partial(_require_package, "lpips", "lpips", "eval"),
}
EXTRACTOR_NAMES = tuple(name for name in NEEDS if name != "lpips")  # lpips: a distance of two images
