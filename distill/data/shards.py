"""Tables of tensors on disk: safetensors shards that are written atomically and read row by row.

Rows that end in zeros (the padding of some text encoders) are stored without them and read back with them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.files import atomic_file

EXACT = 16  # numbers a row that are kept as they are: sizes in pixels do not fit into half precision
ENDS = ".ends"

Rows = dict[str, Tensor]
Entry = dict[str, Any]  # of a table in the index, parsed JSON
Note = dict[str, Any]  # of a shard, parsed JSON


class Table(Protocol):
    """Rows of tensors, read by their numbers."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> Rows:
        """Every tensor [B, ...] of these rows."""
        ...


class Shards:
    """A table of a cache. Only the rows that are requested are read."""

    def __init__(self, folder: Path, name: str, entry: Entry) -> None:
        """entry: of the index, with the "rows" of each shard and the "shapes" of a row."""
        self.files = [folder / file(name, i) for i in range(len(entry["rows"]))]
        if missing := [path.name for path in self.files if not path.is_file()]:
            raise ValueError(f"the cache {folder} has lost {missing[0]}: run the cache command again")
        self.shapes = {key: tuple(shape) for key, shape in entry["shapes"].items()}
        for path, n in zip(self.files, entry["rows"], strict=True):
            _validate_shard(path, n, self.shapes)
        self.ends = list(accumulate(entry["rows"]))
        self.opened: dict[int, safe_open] = {}

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, rows: Sequence[int]) -> Rows:
        one = [self._row(row) for row in rows]
        return {key: torch.stack([row[key] for row in one]) for key in self.shapes}

    def _row(self, row: int) -> Rows:
        if not 0 <= row < len(self):
            raise ValueError(f"{self.files[0].parent}: there is no row {row} of {len(self)}: make the cache again")
        shard = bisect_right(self.ends, row)
        if shard not in self.opened:
            self.opened[shard] = _open_shard(self.files[shard])
        stored = self.opened[shard]
        i = row - (self.ends[shard - 1] if shard else 0)
        return {key: _get(stored, key, i, shape) for key, shape in self.shapes.items()}


def _open_shard(path: Path) -> safe_open:
    """An open shard. ValueError if it is truncated."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated ({error}): run the cache command again to replace it") from None


def _validate_shard(path: Path, n: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless a shard holds n rows of these shapes. Reads its header and the ends of its rows."""
    stored = _open_shard(path)
    for key, shape in shapes.items():
        if key not in stored.keys():
            raise ValueError(f"{path} has no tensor {key}: remove it and run the cache command again")
        stored_shape = tuple(stored.get_slice(key).get_shape())
        if key + ENDS in stored.keys():
            ends = stored.get_tensor(key + ENDS).diff(prepend=torch.zeros(1, dtype=torch.int64))
            fits = len(ends) == n and stored_shape[1:] == shape[1:] and int(ends.sum()) == stored_shape[0]
            fits = fits and bool(((ends >= 0) & (ends <= shape[0])).all())
        else:
            fits = stored_shape == (n, *shape)
        if not fits:
            raise ValueError(
                f"{path}: its tensor {key} is {stored_shape} and not {n} rows of {shape}: remove it and run the cache "
                "command again"
            )


def is_readable(path: Path) -> bool:
    """Whether a shard exists and can be read."""
    if not path.is_file():
        return False
    try:
        return isinstance(note(path)["rows"], int)
    except (ValueError, KeyError, TypeError):
        return False


def _get(stored: safe_open, key: str, i: int, shape: tuple[int, ...]) -> Tensor:
    if key + ENDS not in stored.keys():
        return stored.get_slice(key)[i : i + 1][0]
    first, last = ([0] if i == 0 else []) + stored.get_slice(key + ENDS)[max(i - 1, 0) : i + 1].tolist()
    kept = stored.get_slice(key)[first:last]
    return torch.cat([kept, kept.new_zeros(shape[0] - len(kept), *shape[1:])])


def narrow(rows: Rows, dtype: torch.dtype) -> Rows:
    """Rows on the CPU in `dtype`. Integers, and tensors with at most EXACT numbers a row, keep their type."""
    stored = {}
    for key, value in rows.items():
        value = value.detach().cpu()
        if value.is_floating_point() and value[:1].numel() > EXACT:
            small = value.to(dtype)
            if not torch.isfinite(small).all():
                if not torch.isfinite(value).all():
                    raise ValueError(f"{key} was encoded as NaN or infinity: encode in a wider --precision")
                raise ValueError(f"{key} does not fit {str(dtype).removeprefix('torch.')}: take a wider --dtype")
            value = small
        stored[key] = value
    return stored


def pack(rows: Rows) -> Rows:
    """Rows [N, ...] as a shard stores them. If some rows [L, ...] end in zeros, rows are joined without these zeros."""
    packed = {}
    for key, value in rows.items():
        if value.ndim > 2:
            used = value.flatten(2).ne(0).any(-1)  # [N, L]
            length = (used * torch.arange(1, used.shape[1] + 1)).amax(1)
            if (length < used.shape[1]).any():
                value = torch.cat([row[:n] for row, n in zip(value, length.tolist(), strict=True)])
                packed[key + ENDS] = length.cumsum(0)
        packed[key] = value.contiguous()
    return packed


def file(name: str, shard: int) -> str:
    return f"{name}-{shard:05d}.safetensors"


def note(path: Path) -> Note:
    """The note that `save` stored in a shard."""
    return json.loads(_open_shard(path).metadata()["note"])


def save(rows: Rows, path: Path, about: Note) -> None:
    """Write one shard with a note, atomically."""
    try:
        with atomic_file(path) as partial:
            save_file(rows, partial, {"note": json.dumps(about)})  # one entry: several have no order
            partial.chmod(0o644)  # the library writes files for their owner alone
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from None
