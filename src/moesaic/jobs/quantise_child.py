"""Packs rows of numbers by llama.cpp's own quantiser; in a process of its own, which may abort.

    python -m moesaic.jobs.quantise_child WORK

Prints ``@null`` when the quantiser is found. Then every line on standard input is a request:
``{"type": 12, "rows": 64, "columns": 512}``, of fp32 values in WORK/values. The packed rows go to WORK/packed, and
``@null`` is printed.
"""

from __future__ import annotations

import ctypes
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.evaluate.llama_cpp_library import library, thread_count

PIECE = 2**20  # values that a thread takes at a time
_POINTER, _WHOLE = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "ggml_quantize_init": (None, [ctypes.c_int]),
    "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, _WHOLE]),
    "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, _POINTER, _POINTER, _WHOLE, _WHOLE, _WHOLE, _POINTER]),
}


def main(work: Path) -> None:
    """Answer until the input ends."""
    ggml = library(SIGNATURES)
    with ThreadPoolExecutor(thread_count()) as threads:
        print("@null", flush=True)
        for line in sys.stdin:
            pack(ggml, threads, work, **json.loads(line))
            print("@null", flush=True)


def pack(ggml: Any, threads: ThreadPoolExecutor, work: Path, type: int, rows: int, columns: int) -> None:
    """Pack WORK/values into WORK/packed. Rows do not depend on each other, nor on the number of threads."""
    values = np.fromfile(work / "values", np.float32, rows * columns).reshape(rows, columns)
    size = ggml.ggml_row_size(type, columns)
    packed = np.empty((rows, size), np.uint8)
    ggml.ggml_quantize_init(type)
    step = max(1, PIECE // columns)

    def piece(start: int) -> int:
        end = min(rows, start + step)
        source, destination = values[start:end].ctypes.data, packed[start:end].ctypes.data
        return ggml.ggml_quantize_chunk(type, source, destination, 0, end - start, columns, None)

    written = sum(threads.map(piece, range(0, rows, step)))
    if written != packed.size:
        sys.exit(f"the quantiser wrote {written} bytes where {packed.size} were expected")
    packed.tofile(work / "packed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
