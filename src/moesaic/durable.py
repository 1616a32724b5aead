"""Small file-system operations that survive a crash: afterwards the old state is on disk or the new one."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moesaic.errors import ResourceError

_HINTS = {
    errno.ENOSPC: "free some space and run the same command again: it resumes",
    errno.EDQUOT: "your disk quota is used up; free some space and run the same command again: it resumes",
    errno.EFBIG: "the file-size limit (ulimit -f) is too small; raise it and run the same command again: it resumes",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system error while writing ``path`` into a ResourceError that says what to do."""
    try:
        yield
    except OSError as error:
        raise _resource_error(path, error.errno or 0, error.strerror or str(error)) from error
    except SafetensorError as error:  # safetensors wraps the operating system's error into text
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise _resource_error(path, int(code[1]), os.strerror(int(code[1]))) from error


@contextmanager
def full_disk_errors(path: Path) -> Iterator[None]:
    """:func:`disk_errors` for a full disk, quota or size limit alone; other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno in _HINTS:
            raise _resource_error(path, error.errno, error.strerror or str(error)) from error
        raise


def _resource_error(path: Path, code: int, reason: str) -> ResourceError:
    return ResourceError(
        f"cannot write {path}: {reason}", _HINTS.get(code, "solve that and run the same command again: it resumes")
    )


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and journals renames itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync folders; they have no other way to do it either
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` to a temporary name, then move to ``path``; the file is the old one or the new one at any moment."""
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path):
        try:
            write(temporary)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def replace_text(path: Path, text: str) -> None:
    """:func:`replace_file` with text, UTF-8, line ends as given."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode())

    replace_file(path, write)


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """:func:`replace_file` with a safetensors file. One metadata entry at most: their order on disk is not fixed."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda temporary: save_tensors(temporary, contiguous, metadata or {"format": "pt"}))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file that may be read by whom other new files may be: the library makes them the owner's alone."""
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, then move it to ``path``, replacing a folder that is there.

    The folder around it must exist: one that has vanished since is not made again, as nobody would know whose it is.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path):
        remove_tree(temporary)
        temporary.mkdir()
        write(temporary)
        sync_tree(temporary)
        remove_tree(path)
        temporary.rename(path)
        sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append one line to an existing file and fsync. A crash can leave the line torn: readers must expect that."""
    with disk_errors(path), path.open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """fsync all files and folders below ``folder`` and itself."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all it holds; no error when it is not there."""
    if folder.exists():
        shutil.rmtree(folder)


def empty(folder: Path, keep: str = "") -> None:
    """Remove all that a folder holds, but not itself and not the entry ``keep``."""
    for path in folder.iterdir():
        if path.name == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
