"""A plugin of pytest: the compiled kernel is one for Arm, and every call of it runs in an emulator.

    apt-get install g++-aarch64-linux-gnu qemu-user
    python -m pytest -p tests.nn.emulated_arm tests/nn/test_rows.py tests/nn/test_neuron_kernel.py

What a call reads is written to a file, the emulated program reads it, and what it has written comes back. OpenMP is
left out: there is one thread. Not collected otherwise.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moesaic.nn import moesaic_kernel as module
from moesaic.nn.moesaic_kernel import _FUNCTIONS, FLAGS, PARTS, WEIGHTS, Call, Decode, LowBit

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
OPTIONS = ["-march=armv8.2-a+fp16", "-static", "-fno-strict-aliasing"]
MAIN = r"""
#include <stdio.h>
static void get(FILE *in, void *to, size_t bytes) { if (bytes && fread(to, bytes, 1, in) != 1) exit(9); }
int main(int, char **names) {
  FILE *file = fopen(names[1], "rb");
  int64_t function, structures, fields[2][64], sizes[64], buffers = 0;
  void *memory[64];
  get(file, &function, 8), get(file, &structures, 8);
  for (int s = 0; s < structures; s++) {
    int64_t count;
    get(file, &count, 8);
    for (int64_t i = 0; i < count; i++) {
      int64_t bytes;
      get(file, &bytes, 8);
      if (bytes < 0) { get(file, &fields[s][i], 8); continue; }  // a number, not a pointer
      memory[buffers] = bytes ? malloc(bytes) : nullptr, sizes[buffers] = bytes;
      get(file, memory[buffers], bytes);
      fields[s][i] = (int64_t)memory[buffers++];
    }
  }
  fclose(file);
  int64_t failed = CALL(function, fields[0], fields[1]);
  file = fopen(names[2], "wb");
  fwrite(&failed, 8, 1, file);
  for (int64_t i = 0; i < buffers; i++) if (sizes[i]) fwrite(memory[i], sizes[i], 1, file);
  fclose(file);
}
"""


def sizes_of(call: Any, others: list[Any], element: int) -> dict[str, int]:
    """Bytes of what the pointers of a structure point to."""
    c: Any = call
    if isinstance(call, Call):
        d, p, t = c.d_model, c.neurons, c.tokens
        rows = {name: ((p - 1) * getattr(c, f"{name}_stride") + d) * element for name in ("gate", "up", "down")}
        if others:  # neuron experts in int8 have no matrices, and say by `gate` that there is one
            rows = dict.fromkeys(rows, 1) if others[0].rest else rows
        choices = {"chosen": t * c.top_k * 8, "chosen_weight": t * c.top_k * 4}
        biases = dict.fromkeys(("gate_bias", "up_bias"), p * element)
        return rows | choices | biases | {"member": c.experts * (p - c.shared), **dict.fromkeys("xy", t * d * element)}
    if isinstance(call, LowBit):
        of: Any = others[0]
        p, d, t = of.neurons, of.d_model, of.tokens
        code, groups, wide = p * -(-d // 64) * 8 * c.bits, p * -(-d // c.group) * 2, p * -(-d // 64)
        codes = dict.fromkeys(("gate_codes", "up_codes"), code)
        scales = dict.fromkeys(("gate_scale", "gate_offset", "up_scale", "up_offset"), groups)
        rest = {"rest": wide * 32 * (4 if of.gate else 3), "rest_scale": wide * 2}
        return codes | scales | rest | {"norm": p * 4, "threshold": 4, "scores": t * p * 4, "taken": t * p}
    if isinstance(call, Decode):
        groups = -(-c.d_model // 64)
        low = (c.rows - 1) * c.low_stride + groups * (32 if c.high else 64)
        out = c.rows * c.d_model * (4 if c.single else element)
        return {"high": c.rows * groups * 32, "low": low, "scale": c.rows * groups * 2, "out": out}
    lines = -(-(c.neurons - c.plain) // max(c.width, 1)) if c.by_neurons else c.tokens
    line = c.tokens if c.by_neurons else -(-(c.neurons - c.plain) // max(c.width, 1))
    weight, product = ((lines - 1) * c.stride + line) * element, c.tokens * c.neurons * element
    member = (c.experts - 1) * c.stride + c.neurons - c.plain
    biases = dict.fromkeys(("gate_bias", "up_bias"), c.neurons * element)
    choices = {"chosen": c.tokens * c.top_k * 8, "chosen_weight": c.tokens * c.top_k * 4, "member": member}
    return biases | choices | {"weight": weight, **dict.fromkeys(("gate", "up", "h"), product)}


class Emulated:
    """The functions of a part of the kernel, as `ctypes.CDLL` has them."""

    def __init__(self, dtype: torch.dtype, part: str) -> None:
        self._program, self._functions, self._element = program(dtype, part), list(_FUNCTIONS[part]), dtype.itemsize

    def moesaic_large_pages(self, *_: object) -> None:
        """Nothing to emulate."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        number = self._functions.index(name)
        return lambda *given: self._run(number, [pointer._obj for pointer in given])

    def _run(self, number: int, structures: list[Any]) -> int:
        pointers: list[tuple[int, int]] = []
        text = struct.pack("<qq", number, len(structures))
        for at, own in enumerate(structures):
            sizes = sizes_of(own, [other for other in structures if other is not own], self._element)
            text += struct.pack("<q", len(own._fields_))
            for name, kind in own._fields_:
                value = getattr(own, name)
                if kind is ctypes.c_int64:
                    text += struct.pack("<qq", -1, 1 if name == "threads" else value)
                    continue
                size = sizes[name] if value else 0
                fake = at == 0 and size == 1  # says that there is one, and is not read
                text += struct.pack("<q", size) + (b"\0" if fake else ctypes.string_at(value, size) if size else b"")
                pointers += [(0 if fake else value or 0, size)]
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder) / "given", Path(folder) / "found"
            given.write_bytes(text)
            subprocess.run([*EMULATOR, str(self._program), str(given), str(found)], check=True, timeout=300)
            answer = found.read_bytes()
        place = 8
        for address, size in pointers:
            if address and size:
                ctypes.memmove(address, answer[place : place + size], size)
            place += size
        return struct.unpack("<q", answer[:8])[0]


@cache
def program(dtype: torch.dtype, part: str) -> Path:
    """The kernel and a main function, compiled for Arm."""
    folder = Path(tempfile.mkdtemp())
    cases = []
    for number, (name, arguments) in enumerate(_FUNCTIONS[part].items()):
        casts = ", ".join(f"(const {kind.__name__} *){'ab'[i]}" for i, kind in enumerate(arguments))
        cases.append(f"if (n == {number}) return {name}({casts});")
    call = f"static int64_t CALL(int64_t n, const int64_t *a, const int64_t *b) {{ {' '.join(cases)} return 8; }}"
    (folder / "kernel.cpp").write_text(f"{PARTS[part]}\n{call}\n{MAIN}")
    command = [COMPILER, *FLAGS, *OPTIONS, f"-DWEIGHT={WEIGHTS[dtype]}", str(folder / "kernel.cpp")]
    subprocess.run([*command, "-o", str(folder / "program")], check=True, timeout=600)
    return folder / "program"


@cache
def kernel(dtype: torch.dtype, part: str = module.EXPERTS) -> Any:
    """In place of :func:`moesaic.nn.moesaic_kernel.kernel`."""
    return Emulated(dtype, part)


assert shutil.which(COMPILER), f"there is no {COMPILER}"
assert shutil.which(EMULATOR[0]), f"there is no {EMULATOR[0]}"
module.kernel = kernel
