"""Another process answers, so that its end is not ours: stock transformers, or an engine, which may abort.

The process prints its answers as lines that begin with ``@``; all other lines are ignored. It works at what it was told
and waits for the next line. Each answer has a time limit. However this process ends, the other one ends with it and
leaves nothing (:mod:`moesaic.evaluate.guard`).

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.durable import disk_errors
from moesaic.errors import InputError, UnfinishedCheckError, VerificationError

TIMEOUT_VARIABLE = "MOESAIC_ENGINE_TIMEOUT"
_TIMEOUT = 1800.0
"""Seconds for one answer, the first of which includes loading the model, perhaps from a slow disk."""
_GUARD = Path(__file__).with_name("guard.py")


class Child:
    """A process that answers line by line; a context manager, which ends it.

    Args:
        command: The program and its arguments.
        engine: What runs there, for messages.
        subject: What it works on, for messages.
        environment: Variables in addition to this process's own.
        timeout: Seconds for one answer; by default those of MOESAIC_ENGINE_TIMEOUT, else half an hour.
        work: A temporary folder that goes with it, should this process be killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        engine: str,
        subject: str,
        environment: Mapping[str, str] | None = None,
        timeout: float | None = None,
        work: str = "",
    ) -> None:
        self._engine, self._subject = engine, subject
        self._timeout = _asked_timeout() if timeout is None else timeout
        self._errors: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_GUARD), work, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._process.wait()
        for pipe in (self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def _end(self) -> None:
        """Close its input, at which the guard kills it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # of what it did not read any more
            self._process.stdin.close()

    def send(self, line: str) -> None:
        """Tell it something. That it is dead already shows in :meth:`answer`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def answer(self) -> str:
        """Its next answer, without the ``@``.

        Raises VerificationError when it stops before that, with its last words, or takes too long; it is then dead.
        """
        assert self._process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self._end()

        timer = threading.Timer(self._timeout, end)
        timer.start()
        try:
            for line in self._process.stdout:
                if line.startswith("@"):
                    return line[1:].rstrip("\n")
        finally:
            timer.cancel()
        self._process.wait()
        if late.is_set():
            raise UnfinishedCheckError(
                f"{self._engine} gave no answer for {self._subject} within {self._timeout:g} s",
                f"on a slow machine allow more seconds with {TIMEOUT_VARIABLE}",
            )
        message = f"{self._engine} cannot run {self._subject}: {self._last_words()}"
        if self._process.returncode == -signal.SIGKILL:  # most often by a system without memory
            raise UnfinishedCheckError(message, "is there memory enough? the same command tries again")
        raise VerificationError(message, "report it")

    def _last_words(self) -> str:
        """How it ended, and why as far as it said so: a failed assertion, else the last line."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        asserted = [line for line in lines if "GGML_ASSERT" in line]
        said = (asserted or lines or ["it stopped without a message"])[-1][:700]
        code = self._process.returncode
        if code >= 0:
            return said
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        return f"{name}, {said}"


def answers(
    command: list[str], folder: Path, ids_NW: Tensor, *, engine: str, environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Tensor]]:
    """The tensors that a process writes for each window; at most one window lies on disk at a time.

    The process gets FOLDER and WORK as its last arguments. It reads ``ids`` from WORK/ids.safetensors; for every window
    it writes tensors to WORK/result.safetensors, prints a line ``@ready`` and waits for a line.

    Args:
        command: The program and its first arguments.
        folder: The model.
        ids_NW: Token ids.
        engine: What runs there, for the message.
        environment: Variables in addition to this process's own.

    Raises:
        VerificationError: the process stops before it has answered, with its last words, or takes too long.
        ResourceError: no room for temporary files.
    """
    with tempfile.TemporaryDirectory() as work:
        with disk_errors(Path(work)):
            save_file({"ids": ids_NW.contiguous()}, Path(work) / "ids.safetensors")
        variables = {**(environment or {}), "TMPDIR": work}
        about: dict[str, Any] = {"engine": engine, "subject": str(folder), "environment": variables}
        with Child([*command, str(folder), work], work=work, **about) as child:
            for window in range(len(ids_NW)):
                if window:
                    child.send("")
                child.answer()
                yield load_file(Path(work) / "result.safetensors")


def _asked_timeout() -> float:
    stated = os.environ.get(TIMEOUT_VARIABLE)
    if not stated:
        return _TIMEOUT
    try:
        seconds = float(stated)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise InputError(f"{TIMEOUT_VARIABLE} is {stated!r}", "give a number of seconds, such as 3600")
    return seconds
