"""Tables that are encoded on access. `pipelines.cache` stores their rows: cached and online training see the same."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distill.data.shards import Rows
from distill.data.sources import Pictures
from distill.data.teacher import Teacher
from distill.random import Draw

if TYPE_CHECKING:
    from PIL.Image import Image

SIZES = "time_ids"  # SDXL's condition: original height and width, top and left of the crop, target height and width
CENTRE = (0.5, 0.5)  # the place of a cut
PROBE = 64  # pixels of the image that shows by how much an autoencoder shrinks


class Texts:
    """Conditions of texts: first the prompts, then the captions that are no prompts, last the empty text."""

    def __init__(self, teacher: Teacher, prompts: Sequence[str], captions: Sequence[str] = ()) -> None:
        """Without prompts, the captions are the prompts."""
        self.teacher = teacher
        self.texts = list(prompts)
        row = {text: i for i, text in enumerate(self.texts)}
        for text in captions:
            if row.setdefault(text, len(self.texts)) == len(self.texts):
                self.texts.append(text)
        self.prompts = len(prompts) or len(self.texts)
        self.captions = [row[text] for text in captions]
        self.texts.append("")

    def __len__(self) -> int:
        return len(self.texts)

    @torch.no_grad()
    def read(self, rows: Sequence[int]) -> Rows:
        c = self.teacher.encode([self.texts[i] for i in rows])
        assert c is not None, "a teacher without text encoders"
        return c


class Images:
    """Latents "x" of images and the row of their "caption" in a table of texts; with crops also their SIZES.

    The image is scaled so that its shorter side fills the teacher's square. crops = 0 takes the centre square; else
    `crops` squares at random places are taken. `squeeze` resizes the full image to the square instead, as DMD2 does.
    Row i * crops + j is crop j of image i. Its place and its sample of the autoencoder's posterior depend on the row's
    number alone.
    """

    def __init__(
        self, teacher: Teacher, pictures: Pictures, captions: Sequence[int], crops: int = 0, squeeze: bool = False
    ) -> None:
        if len(teacher.shape) != 3:
            raise ValueError(f"a teacher of videos {tuple(teacher.shape)} cannot use images: leave --images out")
        self.teacher = teacher
        self.pictures = pictures
        self.captions = captions
        self.crops = crops
        self.squeeze = squeeze
        self.decoders = ThreadPoolExecutor(4)

    def __len__(self) -> int:
        return len(self.pictures) * max(self.crops, 1)

    @cached_property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images."""
        probe = torch.zeros(1, 3, PROBE, PROBE, device=self.teacher.parts.device)
        factor = PROBE // self.teacher.latent(probe, torch.zeros(1, 1, 1, 1, device=probe.device)).shape[-1]
        return self.teacher.shape[-2] * factor, self.teacher.shape[-1] * factor

    @torch.no_grad()
    def read(self, rows: Sequence[int]) -> Rows:
        """Raises UnreadableImage for an image that cannot be decoded."""
        device = self.teacher.parts.device
        draw = Draw(0, 0, "images", torch.tensor(rows))
        places = draw.uniform("crop", (len(rows), 2)).tolist()
        size = self.pixels
        numbers = [row // max(self.crops, 1) for row in rows]

        def cut(i: int, place: list[float]) -> tuple[Tensor, list[int]]:
            image = self.pictures[i]
            if self.squeeze:
                return squeeze(image, size), []
            return crop(image, size, place if self.crops else CENTRE)

        images, sizes = zip(*self.decoders.map(cut, numbers, places), strict=True)
        eps = draw.normal("eps", (len(rows), *self.teacher.shape))
        x = self.teacher.latent(torch.stack(images).to(device), eps.to(device))
        table = {"x": x, "caption": torch.tensor([self.captions[i] for i in numbers])}
        return table | ({SIZES: torch.tensor(sizes, dtype=torch.float32)} if self.crops else {})


def squeeze(image: Image, size: tuple[int, int]) -> Tensor:
    """The full image resized to `size` (height, width): [3, H, W] in [-1, 1]."""
    return _tensor(image.resize(size[::-1], 1))  # 1: Lanczos


def crop(image: Image, size: tuple[int, int], place: Sequence[float]) -> tuple[Tensor, list[int]]:
    """(the crop of the image at `place` in [0, 1)^2, SDXL's six sizes of it)."""
    scale = max(size[0] / image.height, size[1] / image.width)
    height = max(size[0], round(image.height * scale))
    width = max(size[1], round(image.width * scale))
    top = int(place[0] * (height - size[0] + 1))
    left = int(place[1] * (width - size[1] + 1))
    cut = image.resize((width, height), 1).crop((left, top, left + size[1], top + size[0]))
    return _tensor(cut), [image.height, image.width, top, left, *size]


def _tensor(image: Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
