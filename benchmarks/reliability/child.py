"""``moesaic ARGS`` in a fork of this process, which has paid for the imports: watched, disturbed, and looked after.

Time is the child's CPU time, so that it does not depend on what else the machine does. What Python and torch need to
start is not in it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from moesaic.cli.main import main as moesaic

POLL = 0.002
GRACE = 10.0
"""Seconds of wall time in which what a killed run has started must be gone."""
LIMIT = 300.0
SHARED_MEMORY = Path("/dev/shm")
_SHARED_NAMES = ("torch_", "psm_")
_MARK = "MOESAIC_RELIABILITY_RUN"
"""In the environment of a run and of all that it starts."""
_NUMBERS = itertools.count()
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Outcome:
    """How one run ended.

    Attributes:
        code: Exit code; negative: the signal that ended it.
        seconds: CPU time, of the processes that it waited for as well.
        out: What it wrote on stdout.
        err: What it wrote on stderr.
        left: Processes and files that it left outside its output.
    """

    code: int
    seconds: float
    out: str
    err: str
    left: tuple[str, ...]

    @property
    def crash(self) -> str | None:
        """The sign of an error that nobody foresaw, if there is one."""
        if self.code not in (0, 1, 2, 3, 4, 130, 143) and self.code >= 0:
            return f"exit code {self.code}"
        if self.code < 0 and -self.code in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL):
            return f"ended by {signal.Signals(-self.code).name}"
        for sign in ("Traceback (most recent call last)", "internal error"):
            if sign in self.err:
                return next(line for line in self.err.splitlines() if sign in line)[:200]
        return None


@dataclass(frozen=True)
class Kill:
    """A signal, sent when the run has used so many seconds of CPU time. SIGINT goes to all its processes, as Ctrl-C."""

    number: int
    moment: float


class Sandbox:
    """A folder for outputs, with a folder for temporary files that must stay empty.

    Not in memory: renames and syncs are those of a disk. ``moesaic`` runs with ``folder`` as its working directory.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "run"
        self.temporary = root / "tmp"
        self._words = root / "words"
        for path in (self.folder, self.temporary, self._words):
            path.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Remove all that runs have left."""
        for path in (self.folder, self.temporary):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()

    def start(self, args: list[str], disturb: Callable[[], object] | None = None, name: str = "run") -> Run:
        """Start ``moesaic ARGS``; ``disturb`` is called in the child first."""
        shared, mark = _shared(), f"{os.getpid()} {next(_NUMBERS)}"
        out, err = (self._words / f"{name}.{stream}" for stream in ("out", "err"))
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.environ |= {"TMPDIR": str(self.temporary), _MARK: mark}
                tempfile.tempdir = None
                os.chdir(self.folder)
                _redirect(1, out)
                _redirect(2, err)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                torch.set_num_threads(1)  # torch replaces the pool of its parent, which threads must not race for
                if disturb is not None:
                    disturb()
                code = run(args)
            except KeyboardInterrupt:
                code = 130  # before moesaic's own code began
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        return Run(child, mark, out, err, self.temporary, shared)

    def run(self, args: list[str], disturb: Callable[[], object] | None = None, kill: Kill | None = None) -> Outcome:
        """:meth:`start`, perhaps killed, to its end."""
        started = self.start(args, disturb)
        if kill is not None:
            started.kill(kill)
        return started.wait()


class Run:
    """A child at work."""

    def __init__(self, child: int, mark: str, out: Path, err: Path, temporary: Path, shared: set[str]) -> None:
        self.child = child
        self._mark = mark
        self._out, self._err, self._temporary, self._shared = out, err, temporary, shared

    def kill(self, kill: Kill) -> None:
        """Wait for the moment and send the signal; a run that ends before gets none."""
        process = psutil.Process(self.child)
        while process.status() != psutil.STATUS_ZOMBIE and _cpu_seconds(process) < kill.moment:
            time.sleep(POLL)
        # Not waited for yet, so the number is still the child's even if it has ended.
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if kill.number == signal.SIGINT else os.kill)(self.child, kill.number)

    def stopped(self) -> bool:
        """Wait until the child has stopped itself (SIGSTOP) or ended; whether it stopped."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            status = psutil.Process(self.child).status()
            if status in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                return status == psutil.STATUS_STOPPED
            time.sleep(POLL)
        return False

    def go_on(self) -> None:
        """Let a stopped child go on."""
        os.kill(self.child, signal.SIGCONT)

    def wait(self) -> Outcome:
        """How it ended, and what it left. A run that does not end is killed, and that is said."""
        deadline = time.monotonic() + LIMIT
        while psutil.Process(self.child).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                os.killpg(self.child, signal.SIGKILL)
                os.wait4(self.child, 0)
                return Outcome(99, LIMIT, "", f"internal error: no end within {LIMIT:.0f} s", ())
            time.sleep(POLL)
        _, status, usage = os.wait4(self.child, 0)
        left = self._left()
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in (self._out, self._err))
        return Outcome(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, out, err, left)

    def _left(self) -> tuple[str, ...]:
        deadline = time.monotonic() + GRACE
        while (left := self._leftovers()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in _members(self._mark):
            process.kill()
        return left

    def _leftovers(self) -> tuple[str, ...]:
        left = [f"process {name}" for name in _alive(self._mark)]
        left += [f"temporary {name}" for name in sorted(_names(self._temporary))]
        return (*left, *(f"shared memory {name}" for name in sorted(_shared() - self._shared)))


def run(args: list[str]) -> int:
    """The exit code of ``moesaic ARGS`` in this process."""
    sys.argv = ["moesaic", *args]
    try:
        moesaic()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def warm_up(args: list[str]) -> None:
    """Run ``moesaic ARGS`` in this process, silently, so that the forks find all modules loaded."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = run(args)
    if code not in (0, 1, 3):
        raise SystemExit(f"moesaic {' '.join(args)} ended with {code}: {err.getvalue()}")


def _redirect(descriptor: int, file: Path) -> None:
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)


def _cpu_seconds(process: psutil.Process) -> float:
    """Of a process and all that it has started."""
    total = 0.0
    for one in [process, *_quietly(lambda: process.children(recursive=True), [])]:
        total += _quietly(lambda one=one: sum(one.cpu_times()[:2]), 0.0)
    return total


def _quietly(ask: Callable[[], _Value], otherwise: _Value) -> _Value:
    try:
        return ask()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return otherwise


def _members(mark: str) -> Iterator[psutil.Process]:
    """Living processes that a run has started."""
    for process in psutil.process_iter():
        if _quietly(lambda one=process: one.environ().get(_MARK), None) == mark:
            yield process


def _alive(mark: str) -> list[str]:
    return [_quietly(lambda one=one: " ".join(one.cmdline())[:80], "?") for one in _members(mark)]


def _shared() -> set[str]:
    """Shared memory of torch and Python; semaphores do not tell whose they are."""
    return {name for name in _names(SHARED_MEMORY) if name.startswith(_SHARED_NAMES)}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
