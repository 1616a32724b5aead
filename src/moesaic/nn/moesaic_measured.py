"""The `moesaic` architecture: which path was the fastest on this machine (see `moesaic_paths.py`).

`moesaic doctor --tune` measures it once and keeps it in the cache folder, a file for each dtype, number of threads,
CPU, version of torch and of the kernel. Where that file is missing or damaged, the table's thresholds hold.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from .moesaic_kernel import NoKernelError, cache_folder, key_of

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
"""Numbers of tokens that are measured. Others are like the nearest of them, by their ratio."""
LAYOUTS = ("packed", "union")
"""Ways of storing experts that are measured."""

Fastest = Mapping[str, tuple[str, ...]]
"""Layout -> the name of the fastest path for each of ``TOKENS``."""


def at(tokens: int) -> int:
    """The place in ``TOKENS`` of the number that is nearest."""
    return min(range(len(TOKENS)), key=lambda i: max(tokens / TOKENS[i], TOKENS[i] / tokens))


@cache
def measured(dtype: torch.dtype, threads: int) -> Fastest | None:
    """What was kept for this machine, or None. Read once per process."""
    try:
        found = json.loads(_file(dtype, threads).read_text(encoding="utf-8"))
        fastest = {layout: tuple(found[layout]) for layout in LAYOUTS}
        right = all(len(names) == len(TOKENS) and all(isinstance(n, str) for n in names) for names in fastest.values())
    except (NoKernelError, OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    return fastest if right else None


def keep(fastest: Fastest, dtype: torch.dtype, threads: int) -> Path:
    """Write what :func:`measured` reads, all or nothing; the file. Raises OSError or NoKernelError."""
    file = _file(dtype, threads)
    handle, scratch = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(dict(fastest), out)
        Path(scratch).replace(file)
    except OSError:
        Path(scratch).unlink(missing_ok=True)
        raise
    measured.cache_clear()
    return file


def _file(dtype: torch.dtype, threads: int) -> Path:
    return cache_folder() / f"paths-{key_of(str(dtype), str(threads))}.json"
