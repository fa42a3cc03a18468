"""Small files, read with size limits and written atomically; the lock of an output folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

LOCK = ".lock"
LIMIT = 1 << 24  # maximum bytes of a small file
YAML = 1 << 18  # maximum bytes of a YAML file: its parser reads about 100 kB a second
UNFOLDED = 1 << 20  # maximum characters of a YAML file after its aliases are expanded
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # set by torchrun and by mpirun
TRIES = 100  # attempts to take a lock while other processes create and delete its file
BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def read_text(path: str | Path, limit: int = LIMIT) -> str:
    """The text of a regular file. ValueError for a device, a pipe, a large file or one that is not UTF-8."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a regular file")
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"{path} has more than {limit:,} bytes; a file of this kind has fewer")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error})") from None


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; ValueError if it cannot be parsed."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file of plain data. ValueError for other files, and for aliases that expand to too much
    text."""
    text = read_text(path, YAML)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded_length(node, {}, set()) > UNFOLDED:
            raise ValueError(f"its aliases stand for more than {UNFOLDED:,} characters")
        return loader.construct_document(node)
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:  # a date of month 13, too deep
        raise ValueError(f"{path} is not YAML: {error}") from None


def _unfolded_length(node: Any, sizes: dict[int, int], above: set[int]) -> int:
    """Number of characters of a node with its aliases expanded. ValueError if it contains itself."""
    key = id(node)
    if key in above:
        raise ValueError(f"an alias holds itself, line {node.start_mark.line + 1}")
    if key not in sizes:
        inner = [node.value] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        above.add(key)
        sizes[key] = 1 + sum(len(one) if isinstance(one, str) else _unfolded_length(one, sizes, above) for one in inner)
        above.remove(key)
    return sizes[key]


@contextmanager
def atomic_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """A hidden file beside `path` to write to. It replaces `path` at the end. An error removes it.

    Several processes may write one file: each has its own hidden file, .NAME.PROCESS.partial. sync: wait until the
    content is on the disk, so that `path` has the old or the new content after a crash of the machine.
    """
    partial = _partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to write to. It replaces `path` at the end. An error removes it."""
    partial = _partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file. After a crash the file has either the old or the new content."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def rank() -> int:
    """The rank of this process, from the launcher's environment variables."""
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()), 0)


@contextmanager
def folder_lock(folder: str | Path, flag: str = "--output_dir", beside: bool = False) -> Iterator[None]:
    """Lock a folder while this process writes to it. ValueError if another process holds the lock.

    The first process of a launch takes the lock for all. The operating system releases the lock when that process ends
    for any reason. beside: put the lock file beside the folder, because the folder will be replaced. flag: flag of the
    folder, for messages.
    """
    if rank():
        yield
        return
    folder = Path(folder)
    real = Path(os.path.realpath(folder))
    file = real.with_name(f".{real.name}.lock") if beside and real.name else folder / LOCK
    new = [parent for parent in file.absolute().parents if not parent.exists()]
    held = _acquire_lock(file, folder, flag)
    try:
        yield
    finally:
        if held is not None:
            file.unlink(missing_ok=True)
            held.close()
        with suppress(OSError):  # remove the folder if a command failed at once
            for parent in new:
                parent.rmdir()


def _acquire_lock(file: Path, folder: Path, flag: str) -> IO[str] | None:
    """The open lock file; None if it cannot be created or the file system has no locks."""
    for _ in range(TRIES):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            held = file.open("a+")
        except FileNotFoundError:  # another process has just removed the folder
            continue
        except OSError:  # the later write fails with a message
            return None
        if not _lock(held, folder, flag):
            held.close()
            file.unlink(missing_ok=True)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held.fileno()), file.stat()):
                with suppress(OSError):  # a full disk
                    held.truncate(0)
                    held.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}")
                    held.flush()
                return held
        held.close()  # the previous holder removed the file first
    return None


def _lock(held: IO[str], folder: Path, flag: str) -> bool:
    """Lock an open file. False, with a warning, if that is impossible. ValueError if another process holds the lock."""
    try:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        why = "this operating system has no flock"
    except OSError as error:
        if error.errno in BUSY:
            held.seek(0)
            who = held.read(200).strip() or "another process"
            held.close()
            raise ValueError(
                f"{folder} is in use by {who}: wait until it has ended, or choose another {flag}"
            ) from None
        why = f"its file system has no locks: {error.strerror}"
    else:
        return True
    sys.stderr.write(f"warning: {folder} is not locked ({why}): start no second command that writes there\n")
    return False
