"""Checkpoints: everything a run is, as safetensors and JSON; written whole or not at all. The teacher is not in them.

`checkpoint-N/` holds one file a role (student, fake, disc, proxy, weight, target), the student's average `ema`, one an
optimizer and `state.json`, with the size and BLAKE2b of each. What does not fit them is torn or corrupted: an older one
is used.
Of a sharded run each is a folder, where every process writes its parts (tensors.py); all processes save together.
Random numbers need no state (random.py), so a resumed run equals the uninterrupted one bit for bit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.diffusion.end_time import SECOND
from distill.files import read_json
from distill.networks.multiplier import DUAL
from distill.ranges import MOST
from distill.sharding import split
from distill.training.state import State
from distill.training.tensors import Share, Stored

FILE = re.compile(r"[A-Za-z]\w*(/[A-Za-z][\w-]*)?\.safetensors")  # of a checkpoint: student, student/shard-00001-of-2
MORE = (SECOND, DUAL)  # the names of what a network may have or not
REFUSED = {  # (why, cure): numbers of the errors
    ("the disk is full", "free some space"): (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    ("the disk is read-only", "make it writable"): (errno.EROFS,),
    ("permission is denied", "grant it"): (errno.EACCES, errno.EPERM),
    ("the disk fails", "see to it"): (errno.EIO, errno.ESTALE),
}


def save(state: State, output_dir: Path, limit: int | None = None) -> Path:
    """Write `checkpoint-{state.step}` and keep `limit` up to it (None: all), itself before all others."""
    share, files = _share(state)
    partial = _prepare(output_dir, state.step, share)
    copied = ((file, {key: _apart(t) for key, t in tensors.items()}) for file, tensors in files.items())
    folder = commit(write(_facts(state), copied, partial, share), limit, share)  # one file at a time is in memory
    if share:
        torch.distributed.barrier()
    return folder


class Saver:
    """Saves in the background, one checkpoint at a time: training waits while its tensors are copied, no longer.

    The next save and leaving `with` wait for the one that is being written; an exception, for it alone; a second
    signal (KeyboardInterrupt), for nothing. What a write raised (a full disk) is raised by the next call.
    The copies stay in memory, pinned where they come from CUDA; a state with no room for them is saved by `save`.
    """

    def __init__(self, output_dir: Path, limit: int | None = None) -> None:
        self.output_dir, self.limit = output_dir, limit
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
        """Begin to write `checkpoint-{state.step}`; the state may change from now on."""
        self.wait()
        facts, (share, files) = _facts(state), _share(state)
        partial = _prepare(self.output_dir, state.step, share)
        copies = {name: self.copies.get(name, {}) for name in files}
        new = [(name, key, t) for name, ts in files.items() for key, t in ts.items() if key not in copies[name]]
        if (need := sum(t.nbytes for *_, t in new)) > psutil.virtual_memory().available:
            sys.stderr.write(f"no memory for a copy of {need / 2**30:.0f} GiB: training waits for checkpoints\n")
            late = ((file, {key: _apart(t) for key, t in tensors.items()}) for file, tensors in files.items())
            commit(write(facts, late, partial, share), self.limit, share)
            return
        for name, key, t in new:
            copies[name][key] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        pairs = [(copies[name][key], t) for name, ts in files.items() for key, t in ts.items()]
        copied = _copy([copy for copy, _ in pairs], [t for _, t in pairs])

        def work() -> None:
            try:
                if copied:
                    copied.synchronize()
                commit(write(facts, copies.items(), partial, share), self.limit, share)
            except BaseException as error:
                self.error = error

        self.copies, self.thread = copies, Thread(target=work, name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread:
            self.thread.join()
        self.check()

    def check(self) -> None:
        """Raise what a write has raised."""
        if self.error:
            error, self.error = self.error, None
            raise error


@torch.no_grad()
def _copy(into: list[Tensor], tensors: list[Tensor]) -> torch.cuda.Event | None:
    """To the CPU. From CUDA without waiting, in the order of its stream: the event tells when it is done."""
    cuda = any(t.is_cuda for t in tensors)
    if into:
        torch._foreach_copy_(into, tensors, non_blocking=cuda)
    if not cuda:
        return None
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event


def _apart(t: Tensor) -> Tensor:
    """On the CPU, in memory of its own."""
    return t.detach().to("cpu", copy=True).contiguous()


def _facts(state: State) -> dict[str, Any]:
    return {"step": state.step, "skipped": {**state.skipped}, "torch": torch.__version__}


def write(
    facts: dict[str, Any], files: Iterable[tuple[str, Mapping[str, Tensor]]], partial: Path, share: Share | None
) -> Path:
    """All of a checkpoint, on the disk in a folder that no one looks for. The first process waits for the others."""
    try:
        written = []
        for file, tensors in files:
            (partial / file).parent.mkdir(exist_ok=True)
            save_file(dict(tensors), partial / file, share.metadata[file] if share else None)
            _sync(partial / file)
            written.append(partial / file)
        sizes = {f"{f.relative_to(partial)}": [f.stat().st_size, digest] for f, digest in _digests(written)}
        if share:
            sizes = share.told(partial, sizes)
        if share is None or share.rank == 0:
            (partial / "state.json").write_text(json.dumps({**facts, "files": sizes}, indent=1))
            _sync(partial / "state.json")
            for folder in (*{file.parent for file in written} - {partial}, partial):
                _sync(folder)
    except BaseException as error:  # a full disk, say: what was written of it would keep it full
        if share:
            share.failed(partial, error)
        if share is None or share.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


def commit(partial: Path, limit: int | None = None, share: Share | None = None) -> Path:
    """Give a written checkpoint its name, at once, and remove what is beyond `limit`."""
    output_dir, folder = partial.parent, partial.with_name(partial.stem[1:])
    if share and share.rank:
        return folder
    replaced = _aside(folder) if os.path.lexists(folder) else None
    os.replace(partial, folder)
    _sync(output_dir)
    if replaced:
        _delete(replaced)
    if limit is not None:
        older = [p for p in _folders(output_dir) if _number(p) < _number(folder)]
        kept = [*(p for p in older if damage(p, deep=False) is None), folder][-limit:]
        for old in older:
            if old not in kept:
                _delete(_aside(old))
    return folder


def load(state: State, folder: Path) -> None:
    """Restore `state` in place from a checkpoint of the same method and networks; a damaged one is a ValueError."""
    if why := damage(folder):
        raise ValueError(why)
    for name, tensors in _tensors(state, empty=True).items():
        path = _path(folder, name)
        if not path.exists():
            raise ValueError(f"{folder} has no {path.name}: it is not a checkpoint of this method and networks")
        stored = Stored(path)
        if name.startswith("optimizer_"):
            if not _load_optimizer(state.optimizers[name.removeprefix("optimizer_")], stored):
                raise ValueError(f"{path} is not of this run's parameters: use the configuration of that run")
            continue
        if stored.shapes != {key: tuple(t.shape) for key, t in tensors.items()}:
            raise ValueError(f"{path} holds other tensors than this run's {name}: use the configuration of that run")
        stored.into(tensors)
    facts = _read_state(folder)
    state.step, state.skipped = facts["step"], facts.get("skipped", {})


def files(path: str | Path, role: str) -> list[Path]:
    """The .safetensors files with weights of `role`, "student" or "fake", at `path`; a ValueError says what it may be.

    A checkpoint-N folder of a run (the student's is its average, where the run kept one), the folder of a diffusers
    network (in shards too) or of a pipeline, or a .safetensors file.
    """
    path = Path(path)
    name = "ema" if role == "student" and _path(path, "ema").exists() else role
    found = [path] if path.suffix == ".safetensors" else []
    if (path / "state.json").is_file():
        found = [_path(path, name)]
    for folder in (path, path / "unet", path / "transformer"):
        whole = folder / "diffusion_pytorch_model.safetensors"
        shards = folder / "diffusion_pytorch_model.safetensors.index.json"
        if whole.is_file():
            found = [whole]
        elif shards.is_file():
            names = _shards(shards, role)
            found = [folder / name for name in names]
    missing = [file for file in found if not file.exists()]
    if missing or not found:
        lack = f"has no {missing[0].name}" if missing else "holds no weights"
        raise ValueError(
            f"{role}.init is {str(path)!r}, which {lack}; it may be a checkpoint-N folder of a run (with {name}."
            "safetensors), a folder with diffusion_pytorch_model.safetensors, or a .safetensors file"
        )
    return found


def _shards(index: Path, role: str) -> list[str]:
    """The files in an index of sharded weights. ValueError if it is not an index or names files elsewhere."""
    tree = read_json(index)
    table = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{role}.init: {index} is not an index of weights: it has no table weight_map")
    names = {name if isinstance(name, str) else repr(name) for name in table.values()}
    if odd := [name for name in sorted(names) if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ValueError(f"{role}.init: {index} names {odd[0]!r}; it may name .safetensors files beside it")
    return sorted(names)


@torch.no_grad()
def fill(net: nn.Module, path: str | Path, role: str, backbone: nn.Module) -> None:
    """Start `net` from the weights at `path` (see `files`): all that it trains, and what else it does not share.

    backbone: the network whose tensors `net` may share; they are never written, and a file for an adapter holds none.
    A ValueError names the first tensor that is missing, unknown or of another shape; then nothing was written. Only a
    second time (end_time.py) and a multiplier (multiplier.py) may be there or not: the network is the same without.
    """
    shared = {id(t) for t in (*backbone.parameters(), *backbone.buffers())}
    buffers, own = dict(net.named_buffers()), {n: t for n, t in _named(net).items() if id(t) not in shared}
    stored = [Stored(file) for file in files(path, role)]
    shapes = {key: shape for file in stored for key, shape in file.shapes.items()}
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    wrong = [f"it has no {name}" for name in trained if name not in shapes and not name.startswith(MORE)]
    unknown = [name for name in shapes if name not in {**own, **buffers} and not name.startswith(MORE)]
    wrong += [f"it has {name}, which this {role} does not" for name in unknown]
    wrong += [
        f"its {name} is {shapes[name]}, this {role}'s {tuple(t.shape)}"
        for name, t in own.items()
        if shapes.get(name, tuple(t.shape)) != tuple(t.shape)
    ]
    if wrong:
        raise ValueError(f"{role}.init {str(path)!r} does not fit: {wrong[0]} ({len(wrong)} such); see {role}.lora too")
    for file in stored:
        file.into({name: t for name, t in own.items() if name in file.shapes})


def refused(error: BaseException) -> str | None:
    """What to tell the user where a disk has refused to be written, or memory is exhausted; None: it is another error.

    safetensors has the number of the error in words only.
    """
    if _is_out_of_memory(error):
        first = str(error).split("\n")[0][:200] or "a MemoryError"
        cure = "take less at once, by a smaller batch or in training by more --gradient_accumulation_steps"
        return f"there is not enough memory ({first}); what was whole before is still there: {cure}"
    said = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    number = int(said[1]) if said else getattr(error, "errno", None)
    for (why, cure), numbers in REFUSED.items():
        if number in numbers:
            return f"{why} ({error}); what was whole before is still there: {cure}"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Of Python, of a GPU, or of torch on the CPU, whose RuntimeError has it in words only."""
    words = "can't allocate memory" in str(error) or "out of memory" in str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or isinstance(error, RuntimeError) and words


def step(folder: Path) -> int:
    """Iterations done when a checkpoint was saved; ValueError where its state.json is damaged."""
    return _read_state(folder)["step"]


def _read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint: step, skipped, files. ValueError if it is damaged."""
    path = folder / "state.json"
    try:
        facts = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is missing or damaged ({error})") from None
    wrong = _state_error(facts)
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong}")
    return facts


def _state_error(facts: Any) -> str | None:
    """The first entry of a state.json that no run writes; None if all are valid."""
    if not isinstance(facts, dict):
        return "it is not a JSON object"
    step, skipped, files = facts.get("step"), facts.get("skipped", {}), facts.get("files", {})
    if type(step) is not int or not 0 <= step <= MOST:
        return f"its step is {step!r}"
    counts = isinstance(skipped, dict) and all(type(n) is int and 0 <= n <= MOST for n in skipped.values())
    if not counts:
        return f"its skipped is {skipped!r}"
    if not isinstance(files, dict):
        return f"its files are {files!r}"
    for name, entry in files.items():
        pair = isinstance(entry, list) and [type(part) for part in entry] == [int, str]
        if not pair or not FILE.fullmatch(name):
            return f"it lists the file {name!r} as {entry!r}"
    return None


def found(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, without those that are torn or corrupted: stderr names them, once each.

    Of the last one every byte has been read; of those before it, the sizes of the files.
    """
    whole: list[Path] = []
    for folder in reversed(_folders(output_dir)):
        if why := damage(folder, deep=not whole):
            _skipped(folder, why)
        else:
            whole.insert(0, folder)
    return whole


def damage(folder: Path, deep: bool = True) -> str | None:
    """What is wrong with a checkpoint and in which file; None: nothing. deep: by its bytes, else by its sizes alone.

    One from before there were checksums is whole if its files can be opened.
    """
    try:
        facts = _read_state(folder)
    except ValueError as error:
        return str(error)
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if named and int(named[1]) != facts["step"]:
        return f"{folder} was renamed: it holds step {facts['step']}, so call it checkpoint-{facts['step']} again"
    written = {folder / name: (size, digest) for name, (size, digest) in facts.get("files", {}).items()}
    try:
        for file, (size, _) in written.items():
            there = file.stat()
            if not stat.S_ISREG(there.st_mode):
                return f"{file} is not a regular file"
            if there.st_size != size:
                return f"{file} is truncated: it has {there.st_size} of {size} bytes"
        for file in () if written else sorted(folder.glob("*.safetensors")):
            Stored(file)
        for file, digest in _digests([*written] if deep else []):
            if digest != written[file][1]:
                return f"{file} is corrupted: its bytes are not those that were written"
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    except ValueError as error:  # of Stored
        return str(error)
    return None


@cache
def _skipped(folder: Path, why: str) -> None:
    sys.stderr.write(f"{folder} is skipped: {why}\n")


def _folders(output_dir: Path) -> list[Path]:
    """Folders with the name of a checkpoint, oldest first; links to folders count."""
    folders = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in folders if p.is_dir() or p.is_symlink()), key=_number)


def _path(folder: Path, name: str) -> Path:
    """The file of a checkpoint, or the folder of its parts."""
    return folder / name if (folder / name).is_dir() else folder / f"{name}.safetensors"


def _prepare(output_dir: Path, step: int, share: Share | None) -> Path:
    """An empty folder to write to; what an earlier process left is removed."""
    partial = output_dir / f".checkpoint-{step}.partial"
    if share is None or share.rank == 0:
        for left in output_dir.glob(".checkpoint-*.partial"):  # by a kill
            _delete(left)
        partial.mkdir(parents=True)
    if share:
        torch.distributed.barrier()
    return partial


def _share(state: State) -> tuple[Share | None, dict[str, dict[str, Tensor]]]:
    """What this process writes: (its share, None of a run that is not sharded; file -> tensors)."""
    files = _tensors(state)
    if not any(split(t) for tensors in files.values() for t in tensors.values()):
        return None, {f"{name}.safetensors": tensors for name, tensors in files.items()}
    share = Share(torch.distributed.get_rank(), torch.distributed.get_world_size())
    held = {share.file(name): share(share.file(name), tensors) for name, tensors in files.items()}
    return share, {f: tensors for f, tensors in held.items() if tensors or not share.rank}  # other nodes' copies: none


def _number(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def _aside(folder: Path) -> Path:
    """Moved to where no one looks for a checkpoint: a kill while it is deleted must not leave half of one."""
    hidden = folder.with_name(f".{folder.name}.old.partial")
    if os.path.lexists(hidden):
        _delete(hidden)
    return folder.rename(hidden)


def _delete(path: Path) -> None:
    """Remove a folder. If it is a link, remove the link only: its target was placed elsewhere on purpose."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    """What was written to a file, or renamed in a folder, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _digests(files: list[Path]) -> Iterator[tuple[Path, str]]:
    """(file, BLAKE2b of its bytes), several at a time; a file that has not changed is read once in a process."""
    stats = [file.stat() for file in files]
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(_digest, files, [(s.st_ino, s.st_size, s.st_mtime_ns) for s in stats])
        yield from zip(files, digests, strict=True)


@cache
def _digest(file: Path, stamp: tuple[int, int, int]) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _tensors(state: State, empty: bool = False) -> dict[str, dict[str, Tensor]]:
    """File name -> tensors. Frozen parameters (the backbone of an adapter) are left out."""
    owned = {id(p) for optimizer in state.optimizers.values() for g in optimizer.param_groups for p in g["params"]}
    files = {role: _named(net, owned if role != "target" else None) for role, net in state.nets.modules().items()}
    student = files["student"].keys()
    if state.ema.net is not state.nets.student.denoiser.net:
        files["ema"] = {key: t for key, t in _named(state.ema.net).items() if key in student}
    if "target" in files:
        files["target"] = {key: t for key, t in files["target"].items() if key in student}
    for player, optimizer in state.optimizers.items():
        entries = [] if empty else [optimizer.state.get(p, {}) for g in optimizer.param_groups for p in g["params"]]
        moments = {f"{i}.{key}": value for i, entry in enumerate(entries) for key, value in entry.items()}
        files[f"optimizer_{player}"] = {key: torch.as_tensor(value) for key, value in moments.items()}
    return files


def _named(net: nn.Module, owned: set[int] | None = None) -> dict[str, Tensor]:
    parameters = {name: p for name, p in net.named_parameters() if owned is None or id(p) in owned}
    return parameters | dict(net.named_buffers())


def _load_optimizer(optimizer: torch.optim.Optimizer, stored: Stored) -> bool:
    """False if the moments do not fit the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {key: int(key.split(".", 1)[0]) for key in stored.shapes}
    entries: dict[int, dict[str, Any]] = {}
    for key, tensor in stored.like({key: params[i] for key, i in numbers.items() if i < len(params)}).items():
        i, name = key.split(".", 1)
        whole = tensor.ndim == 0 and not tensor.is_floating_point()  # the 8-bit optimizer counts its steps in Python
        entries.setdefault(int(i), {})[name] = int(tensor) if whole else tensor
    moment = "exp_avg" if isinstance(optimizer, torch.optim.AdamW | torch.optim.RAdam) else "state1"
    shapes = {i: entry[moment].shape if moment in entry else None for i, entry in entries.items()}
    if any(i >= len(params) or shape != params[i].shape for i, shape in shapes.items()):
        return False
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return True
