"""Sample grids: rows of images with names and prompts, and videos as animations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = 8  # most images side by side
LINE = 16  # pixels: height of a line of text
MARGIN = 72  # pixels: width of the names of rows
LETTER = 6  # pixels: width of a letter
WIDEST = 1280  # pixels of an animation
FRAME = 62  # milliseconds of a frame: 16 frames per second


def compare_rows(rows: Mapping[str, Tensor], captions: Sequence[str]) -> Image:
    """Rows of images [B, C, H, W] or videos in [-1, 1], each with its name at the left, and the captions below them."""
    from PIL import Image, ImageDraw

    tiles = {name: [grid(one[None], 1, 64) for one in x] for name, x in rows.items()}
    count = len(captions)
    columns = min(count, COLUMNS)
    width, height = next(iter(tiles.values()))[0].size
    block = len(tiles) * height + LINE
    picture = Image.new("RGB", (MARGIN + columns * width, -(-count // columns) * block), "white")
    draw = ImageDraw.Draw(picture)
    for i, caption in enumerate(captions):
        left = MARGIN + i % columns * width
        top = i // columns * block
        for row, (name, images) in enumerate(tiles.items()):
            picture.paste(images[i], (left, top + row * height))
            draw.text((2, top + row * height + 2), name, fill="black")
        text = caption.encode("latin-1", "replace").decode("latin-1")[: width // LETTER]
        draw.text((left, top + len(tiles) * height + 2), text, fill="black")
    return picture


def write_animation(x: Tensor, file: Path) -> None:
    """Write videos [B, C, T, H, W] in [-1, 1] as one animated GIF, side by side."""
    columns = min(len(x), COLUMNS)
    stride = max(1, columns * x.shape[-1] // WIDEST)
    frames = [grid(frame, columns, 1) for frame in x[..., ::stride, ::stride].unbind(2)]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=FRAME, loop=0)


def grid(x: Tensor, columns: int = 10, side: int = 32) -> Image:
    """Images [B, C, H, W] in [-1, 1], C = 1 or 3, as one picture. Small ones are enlarged to about `side` pixels.

    A video [B, C, T, H, W] is shown by its first, middle and last frame, side by side.
    """
    from PIL import Image

    if x.ndim == 5:
        x = torch.cat(x[:, :, [0, x.shape[2] // 2, -1]].unbind(2), dim=-1)

    pixels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    scale = max(1, side // pixels.shape[1])
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    B, H, W, C = pixels.shape
    rows = -(-B // columns)
    canvas = np.full((rows * columns, H, W, C), 255, np.uint8)
    canvas[:B] = pixels
    canvas = canvas.reshape(rows, columns, H, W, C).transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, C)
    return Image.fromarray(canvas.squeeze(-1) if C == 1 else canvas)
