"""Write checkpoints to a hidden folder, which is then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Thread

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distill.sharding import is_sharded_tensor
from distill.training.checkpoint.contents import state_tensors
from distill.training.checkpoint.integrity import checkpoint_folders, digests, find_corruption, step_of_name
from distill.training.checkpoint.tensors import RankShard
from distill.training.state import State

DISK_ERRORS = {  # error numbers: (reason, remedy)
    ("the disk is full", "free some space"): (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    ("the disk is read-only", "make it writable"): (errno.EROFS,),
    ("permission is denied", "grant it"): (errno.EACCES, errno.EPERM),
    ("the disk fails", "see to it"): (errno.EIO, errno.ESTALE),
}


def save(state: State, output_dir: Path, limit: int | None = None) -> Path:
    """Write `checkpoint-{state.step}`, and keep the newest `limit` up to it, always including it (None: keep all)."""
    share, files = _share_of_state(state)
    partial = _prepare(output_dir, state.step, share)
    copied = ((file, {key: _cpu_copy(t) for key, t in tensors.items()}) for file, tensors in files.items())
    folder = publish_checkpoint(
        write_files(_facts(state), copied, partial, share), limit, share
    )  # only one file at a time is in memory
    if share:
        torch.distributed.barrier()
    return folder


class Saver:
    """Saves in the background, one checkpoint at a time. Training waits only while its tensors are copied.

    The next save and leaving `with` wait for the current write, and raise its error (a full disk). Leaving `with` by an
    exception only waits. Leaving it by a second signal (KeyboardInterrupt) does not wait.
    The copies stay in memory, pinned for CUDA tensors. If there is no memory for them, `save` writes the state
    directly.
    """

    def __init__(self, output_dir: Path, limit: int | None = None) -> None:
        self.output_dir = output_dir
        self.limit = limit
        self.copies: dict[str, dict[str, Tensor]] = {}
        self.thread: Thread | None = None
        self.error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self.thread and not issubclass(kind, KeyboardInterrupt):
            self.thread.join()

    def save(self, state: State) -> None:
        """Start writing `checkpoint-{state.step}`. The state may change afterwards."""
        self.wait()
        facts = _facts(state)
        share, files = _share_of_state(state)
        partial = _prepare(self.output_dir, state.step, share)
        copies = self._allocate(files)
        if copies is None:
            late = ((file, {key: _cpu_copy(t) for key, t in tensors.items()}) for file, tensors in files.items())
            publish_checkpoint(write_files(facts, late, partial, share), self.limit, share)
            return
        pairs = [(copies[name][key], t) for name, ts in files.items() for key, t in ts.items()]
        copied = _copy_to_cpu([copy for copy, _ in pairs], [t for _, t in pairs])

        def work() -> None:
            try:
                if copied:
                    copied.synchronize()
                publish_checkpoint(write_files(facts, copies.items(), partial, share), self.limit, share)
            except BaseException as error:
                self.error = error

        self.copies = copies
        self.thread = Thread(target=work, name="checkpoint", daemon=True)
        self.thread.start()

    def _allocate(self, files: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]] | None:
        """Memory for a copy of these tensors, reused if it fits. None, with a warning, if there is too little."""
        copies = {name: self.copies.get(name, {}) for name in files}
        new = [(name, key, t) for name, ts in files.items() for key, t in ts.items() if key not in copies[name]]
        needed = sum(t.nbytes for *_, t in new)
        if needed > psutil.virtual_memory().available:
            sys.stderr.write(f"no memory for a copy of {needed / 2**30:.0f} GiB: training waits for checkpoints\n")
            return None
        for name, key, t in new:
            copies[name][key] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        return copies

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.thread:
            self.thread.join()
        self.raise_pending_error()

    def raise_pending_error(self) -> None:
        """Raise the error of a failed write."""
        if self.error:
            error = self.error
            self.error = None
            raise error


@torch.no_grad()
def _copy_to_cpu(into: list[Tensor], tensors: list[Tensor]) -> torch.cuda.Event | None:
    """Copy to the CPU. From CUDA without waiting, in stream order: the event signals the end of the copy."""
    cuda = any(t.is_cuda for t in tensors)
    if into:
        torch._foreach_copy_(into, tensors, non_blocking=cuda)
    if not cuda:
        return None
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event


def _cpu_copy(t: Tensor) -> Tensor:
    """A copy on the CPU with its own memory."""
    return t.detach().to("cpu", copy=True).contiguous()


def _facts(state: State) -> dict[str, object]:
    return {"step": state.step, "skipped": {**state.skipped}, "torch": torch.__version__}


def write_files(
    facts: dict[str, object], files: Iterable[tuple[str, Mapping[str, Tensor]]], partial: Path, share: RankShard | None
) -> Path:
    """Write all files of a checkpoint to a hidden folder, and sync them to the disk. Rank 0 waits for the others."""
    try:
        written = []
        for file, tensors in files:
            (partial / file).parent.mkdir(exist_ok=True)
            save_file(dict(tensors), partial / file, share.metadata[file] if share else None)
            sync_to_disk(partial / file)
            written.append(partial / file)
        sizes = {f"{f.relative_to(partial)}": [f.stat().st_size, digest] for f, digest in digests(written)}
        if share:
            sizes = share.wait_for_all_ranks(partial, sizes)
        if share is None or share.rank == 0:
            (partial / "state.json").write_text(json.dumps({**facts, "files": sizes}, indent=1))
            sync_to_disk(partial / "state.json")
            for folder in (*{file.parent for file in written} - {partial}, partial):
                sync_to_disk(folder)
    except BaseException as error:  # for example a full disk: partial files would keep it full
        if share:
            share.report_error(partial, error)
        if share is None or share.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


def publish_checkpoint(partial: Path, limit: int | None = None, share: RankShard | None = None) -> Path:
    """Rename a written checkpoint to its final name, and delete checkpoints beyond `limit`."""
    output_dir = partial.parent
    folder = partial.with_name(partial.stem[1:])
    if share and share.rank:
        return folder
    replaced = _move_aside(folder) if os.path.lexists(folder) else None
    os.replace(partial, folder)
    sync_to_disk(output_dir)
    if replaced:
        _delete(replaced)
    if limit is not None:
        older = [p for p in checkpoint_folders(output_dir) if step_of_name(p) < step_of_name(folder)]
        kept = [*(p for p in older if find_corruption(p, deep=False) is None), folder][-limit:]
        for old in older:
            if old not in kept:
                _delete(_move_aside(old))
    return folder


def _prepare(output_dir: Path, step: int, share: RankShard | None) -> Path:
    """An empty hidden folder to write to. Remains of an earlier process are deleted."""
    partial = output_dir / f".checkpoint-{step}.partial"
    if share is None or share.rank == 0:
        for left in output_dir.glob(".checkpoint-*.partial"):  # left by a killed process
            _delete(left)
        partial.mkdir(parents=True)
    if share:
        torch.distributed.barrier()
    return partial


def _share_of_state(state: State) -> tuple[RankShard | None, dict[str, dict[str, Tensor]]]:
    """(shard of this process, None for a run without sharding; {file: tensors} that it writes)."""
    files = state_tensors(state)
    if not any(is_sharded_tensor(t) for tensors in files.values() for t in tensors.values()):
        return None, {f"{name}.safetensors": tensors for name, tensors in files.items()}
    share = RankShard(torch.distributed.get_rank(), torch.distributed.get_world_size())
    held = {share.file(name): share(share.file(name), tensors) for name, tensors in files.items()}
    return share, {f: tensors for f, tensors in held.items() if tensors or not share.rank}  # no other node's copies


def _move_aside(folder: Path) -> Path:
    """Rename a checkpoint to a hidden name before deletion, so that a kill cannot leave half of a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.old.partial")
    if os.path.lexists(hidden):
        _delete(hidden)
    return folder.rename(hidden)


def _delete(path: Path) -> None:
    """Delete a folder. If it is a link, delete only the link: its target was placed elsewhere on purpose."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def sync_to_disk(path: Path) -> None:
    """Sync a file's content, or a folder's renames, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def describe_disk_error(error: BaseException) -> str | None:
    """A user message for a disk error (full, read-only, ...) or exhausted memory. None for any other error.

    safetensors gives the error number only as text.
    """
    if _is_out_of_memory(error):
        first = str(error).split("\n")[0][:200] or "a MemoryError"
        cure = "take less at once, by a smaller batch or in training by more --gradient_accumulation_steps"
        return f"there is not enough memory ({first}); what was whole before is still there: {cure}"
    said = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    number = int(said[1]) if said else getattr(error, "errno", None)
    for (why, cure), numbers in DISK_ERRORS.items():
        if number in numbers:
            return f"{why} ({error}); what was whole before is still there: {cure}"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is exhausted: in Python, on a GPU, or in torch on the CPU (RuntimeError with a text)."""
    words = "can't allocate memory" in str(error) or "out of memory" in str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or isinstance(error, RuntimeError) and words
