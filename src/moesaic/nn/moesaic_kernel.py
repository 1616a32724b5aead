"""The `moesaic` architecture: its CPU kernel, compiled at its first use (see `moesaic_path_rows.py`).

The compiler is `$CXX`, `g++`, `c++` or `clang++`, whichever is there first. What it made is kept in `$MOESAIC_CACHE`,
else `moesaic` in the user's cache folder, under a key of all that it depends on. Without a compiler there is no kernel:
one warning says so, and torch computes everything.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers.utils import logging

from .moesaic_kernel_blocks import BLOCKS
from .moesaic_kernel_fused import FUSED
from .moesaic_kernel_nested import NESTED
from .moesaic_kernel_neurons import NEURONS
from .moesaic_kernel_source import ROWS
from .moesaic_kernel_tiles import TILES

EXPERTS, SINGLE = "experts", "neurons"
PARTS = {EXPERTS: ROWS + BLOCKS + TILES + FUSED, SINGLE: ROWS + NEURONS + NESTED}
"""What is compiled together: a model needs one of them, and compiling takes seconds."""
SOURCE = "".join(PARTS.values())


def part_of(layout: str) -> str:
    """The part that computes experts stored so; see `moesaic_paths.py`."""
    return SINGLE if layout in ("neurons", "nested") else EXPERTS


WEIGHTS = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_fast": 2,
    "gelu_pytorch_tanh": 2,
    "relu": 3,
    "relu2": 4,
}
FLAGS = ("-std=c++17", "-O3", "-fPIC")
SECONDS = 120  # until a compiler is given up
OPENMP_RUNTIMES = ("libgomp", "libiomp", "libomp")


class Call(ctypes.Structure):
    """One call of the kernel; the C++ source says what the fields mean."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "gate", "up", "down", "gate_bias", "up_bias")),
        *((name, ctypes.c_void_p) for name in ("chosen", "chosen_weight", "member", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "d_model", "neurons", "shared", "experts", "expert_width")),
        *((name, ctypes.c_int64) for name in ("top_k", "gate_stride", "up_stride", "down_stride")),
        *((name, ctypes.c_int64) for name in ("activation", "threads")),
    ]


class LowBit(ctypes.Structure):
    """The router of neuron experts; the C++ source says what the fields mean."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate_codes", "up_codes", "gate_scale", "gate_offset")),
        *((name, ctypes.c_void_p) for name in ("up_scale", "up_offset", "norm", "threshold", "rest", "rest_scale")),
        *((name, ctypes.c_void_p) for name in ("scores", "taken")),
        *((name, ctypes.c_int64) for name in ("bits", "group")),
    ]


class Fused(ctypes.Structure):
    """What stands between two products; the C++ source says what the fields mean."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate", "up", "gate_bias", "up_bias", "weight", "chosen")),
        *((name, ctypes.c_void_p) for name in ("chosen_weight", "member", "h")),
        *((name, ctypes.c_int64) for name in ("tokens", "neurons", "by_neurons", "plain", "width", "stride")),
        *((name, ctypes.c_int64) for name in ("experts", "top_k", "activation", "threads")),
    ]


class Decode(ctypes.Structure):
    """Codes that become weights; the C++ source says what the fields mean."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("high", "low", "scale", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "d_model", "low_stride", "single", "threads")),
    ]


_FUNCTIONS = {
    EXPERTS: {"moesaic_rows": (Call,), "moesaic_blocks": (Call,), "moesaic_fused": (Fused,)},
    SINGLE: {"moesaic_neurons": (Call, LowBit), "moesaic_nested": (Call, LowBit), "moesaic_decode": (Decode,)},
}


class NoKernelError(Exception):
    """Why there is no kernel."""


@cache
def kernel(dtype: torch.dtype, part: str = EXPERTS) -> ctypes.CDLL | None:
    """A part of the kernel for weights of a dtype in ``WEIGHTS``, or None, with one warning, where it cannot be had."""
    try:
        library = ctypes.CDLL(str(built(dtype, part)))
    except (NoKernelError, OSError) as error:
        warning = f"few tokens are computed by torch, which is slower than the compiled kernel: {error}"
        logging.get_logger(__name__).warning_once(warning)
        return None
    for name, arguments in _FUNCTIONS[part].items():
        getattr(library, name).argtypes = [ctypes.POINTER(argument) for argument in arguments]
    library.moesaic_large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.moesaic_large_pages.restype = None
    return library


def built(dtype: torch.dtype, part: str = EXPERTS) -> Path:
    """The file of a part of the kernel; compiled if it is not in the cache. Several processes may do so at once.

    Raises:
        NoKernelError: no compiler, or none that accepts the source.
    """
    compiler = _compiler()
    name = f"{part}-{key_of(WEIGHTS[dtype], compiler, *FLAGS, *_openmp_runtime())}.so"
    folder = cache_folder()
    if not _whole(folder / name):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = _compile(compiler, PARTS[part], dtype, Path(scratch))
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(folder / name)
    return folder / name


def _whole(library: Path) -> bool:
    """Whether it is there and, if it is ELF, not cut short: its last table ends where the file ends."""
    try:
        with library.open("rb") as file:
            head, size = file.read(64), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return False
    if head[:5] != b"\x7fELF\x02":  # another format, or not 64 bits
        return size > 0
    begin, (entry, entries) = int.from_bytes(head[40:48], sys.byteorder), struct.unpack("=HH", head[58:62])
    return size >= begin + entry * entries


def key_of(*parts: str) -> str:
    """A short name for what depends on the kernel's source, torch, this CPU and ``parts``."""
    return hashlib.sha256(chr(0).join((SOURCE, torch.__version__, _cpu(), *parts)).encode()).hexdigest()[:16]


def _compiler() -> str:
    asked = os.environ.get("CXX")
    found = [path for name in ([asked] if asked else ["g++", "c++", "clang++"]) if (path := shutil.which(name))]
    if not found:
        raise NoKernelError(f"there is no C++ compiler ({asked or 'g++, c++, clang++'}); CXX names one")
    return found[0]


def _compile(compiler: str, text: str, dtype: torch.dtype, scratch: Path) -> Path:
    source, compiled, linked = scratch / "kernel.cpp", scratch / "kernel.o", scratch / "kernel.so"
    source.write_text(text)
    said = ""
    for own_cpu in ("-march=native", "-mcpu=native", None):
        for openmp in (("-fopenmp", _openmp_runtime() or ["-fopenmp"]), (None, [])):
            options = [option for option in (own_cpu, openmp[0]) if option]
            commands = (
                [compiler, *FLAGS, *options, f"-DWEIGHT={WEIGHTS[dtype]}", "-c", str(source), "-o", str(compiled)],
                [compiler, "-shared", str(compiled), *openmp[1], "-o", str(linked)],
            )
            try:
                for command in commands:
                    subprocess.run(command, check=True, capture_output=True, errors="replace", timeout=SECONDS)
            except subprocess.CalledProcessError as error:
                said = said or error.stderr.strip().partition("\n")[0]
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NoKernelError(f"{compiler} cannot be run: {error}") from error
            else:
                return linked
    raise NoKernelError(f"{compiler} does not compile it: {said}")


@cache
def _openmp_runtime() -> list[str]:
    """The file of the OpenMP runtime that torch has loaded: a second one's threads would spin beside its own."""
    maps = Path("/proc/self/maps")
    lines = os.fsdecode(maps.read_bytes()).splitlines() if maps.exists() else []
    paths = [line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6]
    return [path for path in dict.fromkeys(paths) if Path(path).name.startswith(OPENMP_RUNTIMES)][:1]


@cache
def _cpu() -> str:
    """What ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    lines = os.fsdecode(info.read_bytes()).splitlines() if info.exists() else []
    own = dict.fromkeys(line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part")))
    return "\n".join((platform.machine(), platform.processor(), *own))


def cache_folder() -> Path:
    """Where the kernel lies; made where it is missing. Raises NoKernelError."""
    own, general = os.environ.get("MOESAIC_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(own or Path(general) / "moesaic").expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        raise NoKernelError(f"its folder cannot be made: {error}") from error
    if not os.access(folder, os.W_OK):
        raise NoKernelError(f"{folder} cannot be written; MOESAIC_CACHE names another")
    return folder
