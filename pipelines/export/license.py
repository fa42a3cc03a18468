"""The license that a student inherits from its teacher, and the teacher's name on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class License(NamedTuple):
    """A license in the Hub's metadata: an identifier of its list, or "other" with a name and an address."""

    id: str
    name: str | None = None
    link: str | None = None


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
    found = found or BASES.get(name or "")
    if found is None:
        raise ValueError(
            f"the licence of the teacher {str(base)!r} is not known, and its students inherit it: pass --license with "
            "an identifier of the Hub (apache-2.0, openrail++, ...) or --license NAME,URL"
        )
    if found.link and "://" not in found.link:
        found = found._replace(link=f"https://huggingface.co/{name}/blob/main/{found.link}" if name else None)
    return found
