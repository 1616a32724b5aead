"""The command line: one file per verb beside this one; errors become one line and a hint here."""

from __future__ import annotations

import errno
import io
import signal
import sys
import threading
from typing import NoReturn

import typer

import moesaic
from moesaic.cli import (
    bench,
    compare,
    convert,
    demo,
    distill,
    doctor,
    eval,
    export,
    generate,
    inspect,
    methods,
    plan,
    presets,
    push,
    report,
    targets,
    tune,
    undo,
    verify,
)
from moesaic.cli.console import emit, fail
from moesaic.errors import MoesaicError
from moesaic.train.launch import leave, processes

app = typer.Typer(
    name="moesaic",
    help="Turn one dense LLM checkpoint into a Mixture-of-Experts checkpoint, and measure what it cost.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_VERBS = (demo, plan, convert, eval, bench, generate, report, compare, inspect, export, push, tune, distill, verify)
for _verb in (*_VERBS, undo, methods, presets, targets, doctor):
    _verb.attach(app)


_INTERRUPTED = 130
_TERMINATED = 143
_ENDINGS: dict[object, str] = {_INTERRUPTED: "interrupted", _TERMINATED: "terminated"}
_RESUMES = "the same command resumes what it had begun to write"


def _say_version(asked: bool) -> None:
    if asked:
        emit(f"moesaic {moesaic.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the trace of an error."),
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_say_version, is_eager=True),
) -> None:
    """Exit codes: 0 ok, 1 user or input error, 2 usage, 3 verification failed, 4 out of resources, 130 interrupted, 143
    terminated."""


def main() -> None:
    """Run the command line and exit with its code. ``--debug`` counts at any place of the line."""
    _open_streams()
    try:
        _run()
    except SystemExit as end:
        if processes() > 1:
            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _open_streams() -> None:
    """Streams that the caller closed are empty, and take what is said, also letters that they cannot write."""
    sys.stdin = sys.stdin or io.StringIO()
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Signals:
    """Ctrl-C and SIGTERM end a command as exceptions, so that it leaves nothing behind.

    An exception that is raised inside a library's C code may come out as another one: what a command ends with after
    a signal is the signal's doing. ``seen`` is the exit code of the first one.
    """

    def __init__(self) -> None:
        self.seen: int | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminate)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)

    def fail(self, message: str, hint: str, code: int) -> NoReturn:
        """End with an error, or with what a signal asked for."""
        if self.seen is not None:
            fail(_ENDINGS[self.seen], _RESUMES, self.seen)
        fail(message, hint, code)

    def _terminate(self, *_: object) -> None:
        self.seen = self.seen or _TERMINATED
        sys.exit(_TERMINATED)

    def _interrupt(self, *_: object) -> None:
        self.seen = self.seen or _INTERRUPTED
        raise KeyboardInterrupt


def _run() -> None:
    signals = _Signals()
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except MoesaicError as error:
        if debug:
            raise
        signals.fail(error.message, error.hint, error.exit_code)
    except SystemExit as end:
        if isinstance(end.code, int) and end.code in _ENDINGS:  # typer has no more than the code to say
            signals.fail(_ENDINGS[end.code], _RESUMES, end.code)
        raise
    except KeyboardInterrupt:  # before a command has begun: typer ends those that have
        signals.fail(_ENDINGS[_INTERRUPTED], _RESUMES, _INTERRUPTED)
    except MemoryError:
        signals.fail("out of memory", "lower --calib-tokens, or use a machine with more memory", 4)
    except OSError as error:
        if debug:
            raise
        disk_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        signals.fail(
            str(error),
            "free some disk space and run the same command again" if disk_full else "",
            4 if disk_full else 1,
        )
    except Exception as error:
        if debug:
            raise
        signals.fail(
            f"internal error: {type(error).__name__}: {error}",
            "--debug shows the trace; please report it",
            1,
        )
