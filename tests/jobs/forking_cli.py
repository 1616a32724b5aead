"""Runs the command line many times without paying for the imports each time, and kills runs at a given moment.

``python -m tests.jobs.forking_cli`` reads one JSON request a line, ``{"args": [...], "kill_after": seconds or null}``, forks a
child that runs ``moesaic ARGS``, sends it SIGKILL at that time, and answers ``{"code": ..., "seconds": ...}``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve requests until stdin ends."""
    import torch

    torch.set_num_threads(1)
    import moesaic.cli.main
    import moesaic.jobs.convert

    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


def run(args: list[str], kill_after: float | None) -> dict[str, Any]:
    """One run of the command line in a fork of this process; the exit code is negative when a signal ended it."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            devnull = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1):
                os.dup2(devnull, stream)
            sys.argv = ["moesaic", *args]
            sys.modules["moesaic.cli.main"].main()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(99)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # not reaped yet, so the id is still the child's even if it has ended
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
