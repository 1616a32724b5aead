"""What a benchmark says of the machine, and its clocks."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import moesaic.nn

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` is processor time, for a busy machine and one thread."""


def cpu_name() -> str:
    """As /proc/cpuinfo names it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def conditions(clock: str) -> dict[str, str | int]:
    """All that figures of the runtime depend on, with torch's present number of threads and the code as it is now."""
    return {
        "cpu": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "clock": clock,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "runtime": _runtime(),
    }


def _runtime() -> str:
    """Other code of the runtime, another word."""
    files = sorted(Path(str(moesaic.nn.__file__)).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:8]
