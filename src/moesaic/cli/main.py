"""The command line: one file per verb beside this one; errors become one line and a hint here."""

from __future__ import annotations

import errno
import signal
import sys
import threading

import typer

from moesaic.cli import (
    convert,
    demo,
    distill,
    doctor,
    eval,
    export,
    inspect,
    methods,
    plan,
    targets,
    tune,
    undo,
    verify,
)
from moesaic.cli.console import fail
from moesaic.errors import MoesaicError
from moesaic.train.launch import leave, processes

app = typer.Typer(
    name="moesaic",
    help="Turn one dense LLM checkpoint into a Mixture-of-Experts checkpoint, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _verb in (demo, plan, convert, eval, export, inspect, tune, distill, verify, undo, methods, targets, doctor):
    _verb.attach(app)


_INTERRUPTED = 130
_TERMINATED = 143
_RESUMES = "the same command resumes what it had begun to write"


@app.callback()
def _options(debug: bool = typer.Option(False, "--debug", help="Show the trace of an error.")) -> None:
    """Exit codes: 0 ok, 1 user or input error, 2 usage, 3 verification failed, 4 out of resources, 130 interrupted, 143
    terminated."""


def main() -> None:
    """Run the command line and exit with its code. ``--debug`` counts at any place of the line."""
    try:
        _run()
    except SystemExit as end:
        if processes() > 1:
            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _run() -> None:
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # leaves nothing behind, as Ctrl-C
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except MoesaicError as error:
        if debug:
            raise
        fail(error.message, error.hint, error.exit_code)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # typer's only word on it
            fail("interrupted", _RESUMES, _INTERRUPTED)
        if end.code == _TERMINATED:
            fail("terminated", _RESUMES, _TERMINATED)
        raise
    except MemoryError:
        fail("out of memory", "lower --calib-tokens, or use a machine with more memory", 4)
    except OSError as error:
        if debug:
            raise
        disk_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fail(
            str(error),
            "free some disk space and run the same command again" if disk_full else "",
            4 if disk_full else 1,
        )
    except Exception as error:
        if debug:
            raise
        fail(
            f"internal error: {type(error).__name__}: {error}",
            "--debug shows the trace; please report it",
            1,
        )
