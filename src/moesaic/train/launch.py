"""What the launcher (``accelerate launch``, ``torchrun``) says of the processes, read without torch."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from moesaic.errors import InputError


def processes() -> int:
    """How many processes it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_shared(batch: int, accumulate: int) -> None:
    """Refuse a batch that the processes cannot share evenly, each its share in ``accumulate`` parts."""
    if batch % (processes() * accumulate):
        raise InputError(
            f"a batch of {batch} cannot be shared by {processes()} processes in {accumulate} parts",
            "choose a multiple of their product",
        )


def is_worker() -> bool:
    """Whether this is one of several processes that only train, and leave the writing to the first."""
    return processes() > 1 and int(os.environ.get("RANK", "0")) > 0


def is_sharded() -> bool:
    """Whether it asks for FSDP."""
    return processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def leave(code: int) -> NoReturn:
    """End one of several processes at once, its work being done or failed.

    The interpreter's own end would now and then meet a thread of torch's process group that still lets go of a Python
    object, and abort with "terminate called without an active exception" (torch 2.13, gloo).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
