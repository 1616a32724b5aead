"""How much memory of the host a conversion may take: sizes as people write them, and what is free. No torch here."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from moesaic.errors import InputError

SPILL_BYTES = 512 << 20
"""A buffer of all tokens that is larger than this goes to a mapped file, where there is a folder for it."""
_SHARE = 16
"""Of the memory that is allowed, so small a part may one such buffer take."""
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+\.?\d*|\.\d+)\s*([KMGT]I?)?B?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """``8GB``, ``1.5 GiB``, ``500M`` in bytes. Raises InputError for anything else, and for nothing."""
    match = _SIZE.fullmatch(text.strip())
    found = 0 if match is None else round(float(match[1]) * _UNITS[(match[2] or "").upper()])
    if found <= 0:
        raise InputError(f"cannot read the size {text!r}", "write e.g. 8GB, 1.5GiB or 500MB")
    return found


def _checked(text: str) -> str:
    parse_bytes(text)
    return text


MemorySize = Annotated[str, AfterValidator(_checked)]
"""A size that :func:`parse_bytes` reads."""

MEANING = (
    "Memory of the host that the work may take of its own, such as 8GB; mapped weights do not count. Buffers of all "
    "tokens go to files where they are large beside it. Default: what is free."
)


def spill_bytes(allowed: int | None) -> int:
    """From which size on a buffer of all tokens goes to a file. ``allowed``: bytes in all; None: what is free."""
    return SPILL_BYTES if allowed is None else min(SPILL_BYTES, allowed // _SHARE)


def give_back_freed() -> None:
    """Give the system what the C library keeps of freed blocks, where it can (glibc).

    Between two phases of a conversion that is hundreds of megabytes, on top of which the next one would come.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def free_memory() -> int | None:
    """Bytes that a new process can have without others being swapped out; None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    return 1024 * int(text.partition("MemAvailable:")[2].split()[0]) if "MemAvailable:" in text else None
