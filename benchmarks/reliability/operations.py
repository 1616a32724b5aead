"""Disturbances of a run at one of its file operations: refused by the system, a folder gone, the process stopped.

Operations are counted where they reach the system: audit events for names, ``os.fsync``, and the file writer of
safetensors. All of this happens in a forked child, as an audit hook stays.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from moesaic import durable

Kind = Literal["count", "refuse", "vanish", "stop"]
_WRITING = os.O_WRONLY | os.O_RDWR
_NAMES = ("os.rename", "os.mkdir", "os.truncate", "shutil.copyfile", "os.link", "os.symlink")
_REMOVALS = ("os.remove", "os.rmdir")


@dataclass(frozen=True)
class Disturbance:
    """What happens at which operation below ``folder``.

    Attributes:
        kind: ``count``: nothing, the number of operations is written to ``counter``. ``refuse``: this and every later
            operation fails with ``code``. ``vanish``: ``victim`` is removed. ``stop``: the process stops itself.
        folder: Operations elsewhere do not count.
        number: From 1.
        code: Of :mod:`errno`.
        victim: A folder.
        counter: A file.
    """

    kind: Kind
    folder: Path
    number: int = 0
    code: int = errno.ENOSPC
    victim: Path | None = None
    counter: Path | None = None

    def __call__(self) -> None:
        """Install it in this process."""
        _Hook(self).install()


class _Hook:
    def __init__(self, disturbance: Disturbance) -> None:
        self._plan = disturbance
        self._folder = disturbance.folder
        self._count = 0
        self._busy = False

    def install(self) -> None:
        real_fsync = os.fsync

        def fsync(descriptor: int) -> None:
            if self._inside(Path(f"/proc/self/fd/{descriptor}").readlink()):
                self._tick()
            real_fsync(descriptor)

        def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
            try:
                if self._inside(path):
                    self._tick()
            except OSError as error:
                path.unlink(missing_ok=True)
                _write_some(path)
                text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise SafetensorError(text) from None
            save_file(tensors, path, metadata=metadata)

        os.fsync = fsync
        durable.save_file = save  # type: ignore[assignment]
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        counted = writes or event in _NAMES or (event in _REMOVALS and self._plan.code == errno.EROFS)
        if counted and self._inside(arguments[1 if event == "shutil.copyfile" else 0]):
            self._tick()

    def _inside(self, path: Any) -> bool:
        try:
            return (Path.cwd() / os.fsdecode(path)).is_relative_to(self._folder)
        except (TypeError, FileNotFoundError):  # a descriptor; a working directory that is gone
            return False

    def _tick(self) -> None:
        plan = self._plan
        self._count += 1
        if plan.kind == "count":
            assert plan.counter is not None
            self._quietly(lambda: plan.counter.write_text(str(self._count)))  # type: ignore[union-attr]
        elif plan.kind == "refuse" and self._count >= plan.number:
            raise OSError(plan.code, os.strerror(plan.code))
        elif self._count == plan.number and plan.kind == "vanish":
            assert plan.victim is not None
            self._quietly(lambda: shutil.rmtree(plan.victim, ignore_errors=True))  # type: ignore[arg-type]
        elif self._count == plan.number and plan.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)

    def _quietly(self, action: Callable[[], object]) -> None:
        self._busy = True
        action()
        self._busy = False


def _write_some(path: Path) -> None:
    """What a writer leaves that ran into a full disk, without being heard."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT)
    os.close(descriptor)
