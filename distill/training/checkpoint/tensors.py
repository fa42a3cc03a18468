"""Tensors on disk: a safetensors file, or for a sharded run a folder of them, one per process.

The folder has the format of torch.distributed.checkpoint's HuggingFace storage, which reads it into shards of any
number of processes, or into full tensors.
"""

from __future__ import annotations

import errno
import json
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.sharding import is_sharded_tensor, local_slices, part


@dataclass
class RankShard:
    """The part of a checkpoint that process `rank` of `of` writes. metadata: the positions of shards in its files."""

    rank: int
    of: int
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)

    def file(self, name: str) -> str:
        return f"{name}/shard-{self.rank + 1:05}-of-{self.of:05}.safetensors"

    def __call__(self, file: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The shards that this process holds of a file's tensors. On rank 0 also unsharded tensors."""
        held = {key: t for key, t in tensors.items() if self._is_writer(t)}
        info = {key: {"saved_offsets": [s.start for s in local_slices(t)]} for key, t in held.items()}
        self.metadata[file] = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
        return {key: part(t.detach()) for key, t in held.items()}

    def _is_writer(self, t: Tensor) -> bool:
        if not is_sharded_tensor(t):
            return self.rank == 0
        mesh = t.device_mesh  # type: ignore[attr-defined]
        copy = "dp_replicate" in (mesh.mesh_dim_names or ()) and mesh.get_local_rank("dp_replicate")
        return not copy and part(t).numel() > 0

    def wait_for_all_ranks(self, partial: Path, sizes: dict[str, Any]) -> dict[str, Any]:
        """Report this rank's files to rank 0. Rank 0 waits for all ranks and returns the merged list."""
        self._report(partial, {"files": sizes})
        if self.rank:
            return sizes
        every = [partial / f"process-{rank}.json" for rank in range(self.of)]
        while not all(file.exists() for file in every):
            time.sleep(0.05)
        said = [json.loads(file.read_text()) for file in every]
        if errors := [one["error"] for one in said if "error" in one]:
            raise OSError(*errors[0])
        for file in every:
            file.unlink()
        return {name: facts for one in said for name, facts in one["files"].items()}

    def report_error(self, partial: Path, error: BaseException) -> None:
        """Report an error to rank 0."""
        with suppress(OSError):
            self._report(
                partial, {"error": [getattr(error, "errno", None) or errno.EIO, f"process {self.rank}: {error}"]}
            )

    def _report(self, partial: Path, facts: dict[str, object]) -> None:
        draft = partial / f"process-{self.rank}.draft"
        draft.write_text(json.dumps(facts))
        draft.rename(draft.with_suffix(".json"))


def open_safetensors(file: Path) -> Any:
    """Open a safetensors file for reading. ValueError if it is damaged."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not a regular file")
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error})") from None


class TensorReader:
    """Reads tensors at a path and knows their shapes. ValueError if the file is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            from torch.distributed.checkpoint import HuggingFaceStorageReader

            if odd := [file for file in path.iterdir() if not file.is_file()]:
                raise ValueError(f"{odd[0]} is not a regular file")
            self.reader = HuggingFaceStorageReader(f"{path}")
            try:
                found = self.reader.read_metadata().state_dict_metadata
            except Exception as error:  # the reader does not check: a damaged header may raise anything
                raise ValueError(f"{path} holds a damaged file ({error!r})") from None
            self.shapes = {key: tuple(meta.size) for key, meta in found.items()}  # type: ignore[union-attr]
            self.dtypes = {key: meta.properties.dtype for key, meta in found.items()}  # type: ignore[union-attr]
        else:
            self.file = open_safetensors(path)
            self.shapes = {key: tuple(self.file.get_slice(key).get_shape()) for key in self.file.keys()}  # noqa: SIM118

    @torch.no_grad()
    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Read into the given tensors, in place. A sharded tensor gets this process's shard."""
        if not self.path.is_dir():
            for key, t in tensors.items():
                part(t).copy_(self.file.get_tensor(key)[local_slices(t)])
            return
        from torch.distributed.checkpoint import load

        with warnings.catch_warnings():  # it warns that it reads without the other processes, which is intended
            warnings.simplefilter("ignore", UserWarning)
            load({key: t.detach() for key, t in tensors.items()}, storage_reader=self.reader, no_dist=True)

    def read_like(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All stored tensors, as new tensors. Sharded like the given tensor of the same name and shape, else full."""
        if not self.path.is_dir():
            new = {key: self.file.get_tensor(key) for key in self.shapes}
        else:
            new = {key: torch.empty(shape, dtype=self.dtypes[key]) for key, shape in self.shapes.items()}
        for key, t in tensors.items():
            if is_sharded_tensor(t) and key in new and new[key].shape == t.shape:
                new[key] = torch.empty_like(t, dtype=new[key].dtype)
        self.read_into(new if self.path.is_dir() else {key: t for key, t in new.items() if is_sharded_tensor(t)})
        return new
