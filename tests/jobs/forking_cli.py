"""Runs the command line many times without paying for the imports each time, and kills runs at a given moment.

``python -m tests.jobs.forking_cli`` reads a JSON request a line: ``{"args": [...], "fork": true, "kill_after": 0.3}``.
It forks a child that runs ``moesaic ARGS``, sends it SIGKILL after so many seconds of CPU time (null: never),
and answers ``{"code": ..., "seconds": ...}``, in CPU time too: that does not depend on what else the machine does. A
first request without ``fork`` runs in this process and loads all that later runs need.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import psutil
import torch

from moesaic.cli.main import main as moesaic


def serve() -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)


def answer(args: list[str], fork: bool, kill_after: float | None) -> dict[str, Any]:
    """One run of the command line; the exit code is negative when a signal ended it."""
    if not fork:
        return {"code": run(args), "seconds": None}
    code, seconds = run_in_child(args, kill_after)
    return {"code": code, "seconds": seconds}


def run_in_child(args: list[str], kill_after: float | None) -> tuple[int, float]:
    """:func:`run` in a fork of this process, and its CPU seconds."""
    child = os.fork()
    if child == 0:
        code = 99
        torch.set_num_threads(1)  # torch replaces the pool of its parent, which threads must not race for
        try:
            code = run(args)
        finally:
            os._exit(code)
    if kill_after is not None:
        process = psutil.Process(child)
        while process.status() != psutil.STATUS_ZOMBIE and sum(process.cpu_times()[:2]) < kill_after:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still the child's even if it has ended
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def run(args: list[str]) -> int:
    """The exit code of ``moesaic ARGS``."""
    sys.argv = ["moesaic", *args]
    try:
        moesaic()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    serve()
