"""Memory that a process has freed stays with it, so that the next tensor finds its pages."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
_LARGEST_KEPT = 2**31 - 1


def keep_freed_pages() -> None:
    """Tell glibc to keep freed blocks for this process, up to 2 GiB at the end of its heap.

    By default it returns large ones to the system, and every pass over activations then waits for fresh pages: passes
    over 2,048 tokens take from 2 to 4 times as long.
    Nothing happens where there is another allocator, or where the user has set glibc's variables.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return
    set_option(_MMAP_MAX, 0)
    set_option(_TRIM_THRESHOLD, _LARGEST_KEPT)
