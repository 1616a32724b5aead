"""Runs a program for another process and ends it when that process is gone, whatever ended it.

    python -I guard.py WORK PROGRAM ARGUMENTS

The program gets the lines of this process's input and has its output and errors. At the end of the input, which comes
when the other process closes the pipe or dies, the program and all that it started are killed, and the folder WORK is
removed. Needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading


def main(work: str, command: list[str]) -> int:
    """Run the program to its end or to that of the input; its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the other process decides; a handler is not inherited by programs
        signal.signal(number, lambda *_: None)
    program = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the end of the output is that of the program
    abandoned = threading.Event()

    def pass_on() -> None:
        assert program.stdin is not None
        while line := os.read(0, 65536):
            with contextlib.suppress(BrokenPipeError):  # it is dead, which its output tells
                program.stdin.write(line)
                program.stdin.flush()
        abandoned.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)

    threading.Thread(target=pass_on, daemon=True).start()
    code = program.wait()
    if abandoned.is_set():
        shutil.rmtree(work, ignore_errors=True)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
