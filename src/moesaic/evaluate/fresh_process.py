"""Another process answers token windows, one at a time, without moesaic: stock transformers, or an engine in another
virtual environment.

The process gets FOLDER and WORK as its last arguments. It reads ``ids`` from WORK/ids.safetensors; for every window it
writes tensors to WORK/result.safetensors, prints a line ``@ready`` and waits for a line.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.errors import VerificationError


def answers(
    command: list[str], folder: Path, ids_NW: Tensor, *, engine: str, environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Tensor]]:
    """The tensors that the process writes for each window; at most one window lies on disk at a time.

    Args:
        command: The program and its first arguments.
        folder: The model.
        ids_NW: Token ids.
        engine: What runs there, for the message.
        environment: Variables in addition to this process's own.

    Raises:
        VerificationError: the process stops before it has answered, with its last words.
    """
    with tempfile.TemporaryDirectory() as work, (Path(work) / "errors").open("w+", errors="replace") as errors:
        save_file({"ids": ids_NW.contiguous()}, Path(work) / "ids.safetensors")
        with subprocess.Popen(
            [*command, str(folder), work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {}), "TMPDIR": work},
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                for window in range(len(ids_NW)):
                    if window:
                        with contextlib.suppress(BrokenPipeError):  # it is dead: seen below
                            process.stdin.write("\n")
                            process.stdin.flush()
                    if not any(line.startswith("@ready") for line in process.stdout):
                        process.wait()
                        raise VerificationError(f"{engine} cannot run {folder}: {_last_line(errors)}", "report it")
                    yield load_file(Path(work) / "result.safetensors")
            finally:
                process.kill()
                with contextlib.suppress(BrokenPipeError):  # of what it did not read any more
                    process.stdin.close()


def _last_line(errors: TextIO) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return lines[-1][:700] if lines else "it stopped without a message"
