"""Starting a job in two gloo processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


def start_two(module: str, environment: dict[str, str], *arguments: object) -> list[subprocess.Popen[str]]:
    """Start ``python -m module arguments`` twice, as the two processes of one job on CPUs, with the code under test.

    Like the command line the module ends by :func:`moesaic.train.launch.leave`, which says why.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    common = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": code, **environment}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def two_processes(module: str, environment: dict[str, str], *arguments: object) -> None:
    """:func:`start_two`, and wait for both to end well."""
    for process in start_two(module, environment, *arguments):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
