"""llama.cpp's C functions, from the library in the wheel xllamacpp. For processes of their own: they may abort."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Signatures = Mapping[str, tuple[Any, list[Any]]]
"""Name of a function -> what it returns, and its arguments."""


def library(signatures: Signatures) -> Any:
    """The library, with functions typed as given. Ends the process where it does not show one of them."""
    found = importlib.util.find_spec("xllamacpp")
    folder = Path(found.origin).parent if found and found.origin else Path()
    for file in sorted([*folder.glob("xllamacpp*.so"), *folder.glob("xllamacpp*.pyd")]):
        loaded: Any = ctypes.CDLL(str(file))
        if all(hasattr(loaded, name) for name in signatures):
            for name, (result, arguments) in signatures.items():
                function = getattr(loaded, name)
                function.restype, function.argtypes = result, arguments
            return loaded
    sys.exit("this xllamacpp does not show the functions of llama.cpp that are needed")


def thread_count() -> int:
    """As many as the user allows."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
