"""A single output file that is absent or complete: written and checked in a folder beside it, then moved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moesaic.durable import disk_errors, full_disk_errors, sync
from moesaic.errors import InputError

_LOCK = "lock"


@contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """A path for the file, under its own name, inside ``OUTPUT.partial``; it becomes ``output`` when the block ends.

    When the block raises, nothing stays. What a killed process left is cleared by the next call for the same output.

    Raises:
        InputError: another process writes the same file, or something else is in the way.
        ResourceError: the disk is full.
    """
    staging = output.with_name(f"{output.name}.partial")
    lock = _lock(staging, output)
    try:
        file = staging / output.name
        with full_disk_errors(output):
            file.unlink(missing_ok=True)
            yield file
        with disk_errors(output):
            sync(file)
            if output.exists() or output.is_symlink():
                raise InputError(f"{output} exists already", "choose another file, or remove it first")
            file.replace(output)
            sync(output.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        lock.release()


def _lock(staging: Path, output: Path) -> FileLock:
    if staging.is_symlink() or (staging.exists() and not _is_ours(staging, output)):
        raise InputError(f"{staging} is in the way and no unfinished output of moesaic", "move it elsewhere")
    lock = FileLock(staging / _LOCK, timeout=0)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another process is writing {output}", "wait for it or choose another output") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot create {staging}: {getattr(error, 'strerror', None) or error}", "may this user write there?"
        ) from error
    return lock


def _is_ours(staging: Path, output: Path) -> bool:
    return staging.is_dir() and {path.name for path in staging.iterdir()} <= {_LOCK, output.name, f"{output.name}.tmp"}
