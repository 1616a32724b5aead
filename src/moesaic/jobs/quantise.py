"""llama.cpp's own quantiser, for GGUF types that nothing in Python packs. It runs in a process of its own."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.durable import disk_errors
from moesaic.errors import InputError
from moesaic.evaluate.fresh_process import Child
from moesaic.evaluate.llama_cpp import available

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_AT_ONCE = 2**26
"""Values that are handed over at a time: 256 MiB."""


class Quantiser:
    """Packs rows by llama.cpp; a context manager, which begins and ends its process.

    Raises:
        InputError: xllamacpp is not installed.
        VerificationError: llama.cpp aborts, or this xllamacpp does not show its quantiser; so does :meth:`pack`.
        ResourceError: no room for temporary files.
    """

    def __init__(self) -> None:
        if not available():
            raise InputError("llama.cpp's quantiser comes with xllamacpp", "pip install 'moesaic[llama-cpp]'")

    def __enter__(self) -> Quantiser:
        self._folder = tempfile.TemporaryDirectory()
        self._work = Path(self._folder.name)
        command = [sys.executable, "-P", "-m", "moesaic.jobs.quantise_child", str(self._work)]
        about: dict[str, Any] = {"engine": "llama.cpp's quantiser", "subject": "the tensors", "work": str(self._work)}
        self._child = Child(command, **about, environment={"GGML_NO_BACKTRACE": "1"})
        try:
            self._child.answer()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.__exit__(kind, error, trace)
        self._folder.cleanup()

    def pack(self, values: np.ndarray[Any, Any], stored: GGMLQuantizationType) -> np.ndarray[Any, Any]:
        """The rows of an fp32 array [..., columns] in a type, as bytes [..., bytes of a row]."""
        columns = values.shape[-1]
        rows = values.reshape(-1, columns)
        step = max(1, _AT_ONCE // columns)
        parts = [self._pack(rows[start : start + step], stored) for start in range(0, len(rows), step)]
        return np.concatenate(parts).reshape(*values.shape[:-1], -1)

    def _pack(self, rows: np.ndarray[Any, Any], stored: GGMLQuantizationType) -> np.ndarray[Any, Any]:
        with disk_errors(self._work):
            rows.astype(np.float32, copy=False).tofile(self._work / "values")
        self._child.send(json.dumps({"type": int(stored), "rows": len(rows), "columns": rows.shape[1]}))
        self._child.answer()
        return np.fromfile(self._work / "packed", np.uint8).reshape(len(rows), -1)
