"""The license that a student inherits from its teacher, and the teacher's name on the Hub."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple


class License(NamedTuple):
    """A license in the Hub's metadata: an identifier of its list, or "other" with a name and an address."""

    id: str
    name: str | None = None
    link: str | None = None


LICENSE_FILES = (
    "*LICENSE*",
    "*LICENCE*",
    "NOTICE",
    "NOTICE[._-]*",
    "COPYING*",
    "COPYRIGHT*",
    "USE_POLICY*",
)  # in upper case
NON_COMMERCIAL = re.compile(r"(?<![a-z])nc(?![a-z])|non-?commercial|nscl|amlr|research", re.IGNORECASE)
UNKNOWN = License("other", "that-of-the-teacher")  # for students that are not published
_DECLARED = {  # license: teachers whose pages on the Hub declare it
    License("creativeml-openrail-m"): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    License("openrail++"): """
        stabilityai/stable-diffusion-2-1 stabilityai/stable-diffusion-2-1-base
        stabilityai/stable-diffusion-xl-base-1.0
        PixArt-alpha/PixArt-XL-2-512x512 PixArt-alpha/PixArt-XL-2-1024-MS
        PixArt-alpha/PixArt-Sigma-XL-2-512-MS PixArt-alpha/PixArt-Sigma-XL-2-1024-MS""",
    License("other", "stabilityai-nc-research-community", "LICENSE"): "stabilityai/stable-diffusion-3-medium-diffusers",
    License("other", "stabilityai-ai-community", "LICENSE.md"): """
        stabilityai/stable-diffusion-3.5-medium stabilityai/stable-diffusion-3.5-large""",
    License("other", "flux-1-dev-non-commercial-license", "LICENSE.md"): "black-forest-labs/FLUX.1-dev",
    License("other", "nscl-v2-custom", "LICENSE.txt"): """
        Efficient-Large-Model/Sana_600M_512px_diffusers Efficient-Large-Model/Sana_600M_1024px_diffusers
        Efficient-Large-Model/Sana_1600M_512px_diffusers Efficient-Large-Model/Sana_1600M_1024px_diffusers
        Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers""",
    License("apache-2.0"): """
        black-forest-labs/FLUX.1-schnell Qwen/Qwen-Image
        Wan-AI/Wan2.1-T2V-1.3B-Diffusers Wan-AI/Wan2.1-T2V-14B-Diffusers
        Wan-AI/Wan2.2-T2V-A14B-Diffusers Wan-AI/Wan2.2-TI2V-5B-Diffusers""",
}
BASES = {name: found for found, names in _DECLARED.items() for name in names.split()}


def is_license_file(name: str) -> bool:
    """Whether a file at the top of a repository holds the terms of its licence, or a notice that they require."""
    return any(fnmatchcase(name.upper(), pattern) for pattern in LICENSE_FILES)


def license_files(folder: Path) -> list[Path]:
    """The files of the licence at the top of a pipeline's folder."""
    return sorted(file for file in folder.iterdir() if file.is_file() and is_license_file(file.name))


def fetch_license_files(folder: Path) -> None:
    """Download licence, notice and README of a teacher from the Hub, beside its components in the Hub's cache.

    diffusers downloads only the components. Without the network nothing is downloaded.
    """
    from huggingface_hub import snapshot_download

    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)$", str(folder))
    if not cached or license_files(folder):
        return
    patterns = [form for pattern in LICENSE_FILES for form in (pattern, pattern.lower(), pattern.title())]
    name = f"{cached[1]}/{cached[2]}"
    try:
        snapshot_download(name, revision=cached[3], allow_patterns=[*patterns, "README.md"])
    except (OSError, ValueError, RuntimeError) as error:  # no network, no access: a public push is refused later
        sys.stderr.write(f"the licence files of {name} cannot be fetched: {str(error).splitlines()[0]}\n")


def license_source(base: str | Path, folder: Path) -> str | Path:
    """Where the licence of a teacher is read: its folder, if that is the user's own or a snapshot of the Hub."""
    return folder if Path(base).exists() or "models--" in f"{folder}" else base


def refuse_public_push(base: str | Path, folder: Path, student: License) -> None:
    """ValueError if students of the teacher `base`, whose files are in `folder`, must not be published so.

    The files of its licence must travel with them, and a non-commercial teacher's students keep its licence.
    """
    if not license_files(folder):
        raise ValueError(
            f"--push_to_hub: the teacher {str(base)!r} has no file of its licence, which its students must carry: put "
            f"LICENSE (and NOTICE, if there is one) into {folder}, or pass --hub_private"
        )
    try:
        own = find_license(license_source(base, folder))
    except ValueError:  # not known; the user has named it
        return
    if NON_COMMERCIAL.search(f"{own.id} {own.name or ''}") and own[:2] != student[:2]:
        raise ValueError(
            f"--license {student.name or student.id}: the teacher {str(base)!r} has the non-commercial licence "
            f"{own.name or own.id}, and so have its students: leave --license out, or pass --hub_private"
        )


def hub_name(base: str | Path) -> str | None:
    """The teacher's name on the Hub, for a folder in its cache, a known folder name or "owner/name"; else None."""
    if cached := re.search(r"models--([^/]+?)--([^/]+)/snapshots/", str(base)):
        return f"{cached[1]}/{cached[2]}"
    for known in BASES:
        if known.split("/")[1] == Path(base).name:
            return known
    return str(base) if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(base)) and not Path(base).exists() else None


def find_license(base: str | Path, given: str | None = None) -> License:
    """The license of the students of `base`: `given`, else the one in the folder's README.md, else a known teacher's.

    given: an identifier of the Hub's list, or "NAME,URL" for any other. ValueError if no license is known.
    """
    from huggingface_hub import metadata_load

    if given:
        title, _, link = given.partition(",")
        return License("other", title, link) if link else License(title)
    name = hub_name(base)
    readme = Path(base) / "README.md"
    said = (metadata_load(readme) if readme.is_file() else None) or {}
    found = License(said["license"], said.get("license_name"), said.get("license_link")) if "license" in said else None
    found = BASES.get(name or "") if found in (None, UNKNOWN) else found
    if found is None:
        raise ValueError(
            f"the licence of the teacher {str(name or base)!r} is not known, and its students inherit it: pass "
            "--license with an identifier of the Hub (apache-2.0, openrail++, ...) or --license NAME,URL"
        )
    if found.link and "://" not in found.link:
        found = found._replace(link=f"https://huggingface.co/{name}/blob/main/{found.link}" if name else None)
    return found
