"""Run by `test_triton.py`: Triton's compiler has more to say than its interpreter, and needs no GPU to say it.

Launches are those of the paths. Only what asks the driver is replaced: it names a GPU that is not there, and nothing is
launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.runtime.jit import JITFunction  # pyright: ignore[reportMissingImports]

from moesaic.nn.moesaic_path_triton import grouped, rows
from tests.nn.test_rows import ffn_of

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED_BYTES = 64 * 1024
"""What every GPU has for a block: AMD's have the least."""


class Absent(NamedTuple):
    """What Triton asks a driver before it compiles."""

    target: GPUTarget

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@pytest.fixture(params=TARGETS)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was compiled, by the kernels' names."""
    found: dict[str, Any] = {}

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            found[kernel.__name__] = kernel.run(*args, grid=grid, warmup=True, **options | {"WIDE": False})

        return compile_only

    monkeypatch.setattr(JITFunction, "__getitem__", launch)
    triton.runtime.driver.set_active(Absent(TARGETS[request.param]))
    return found


@pytest.mark.parametrize(
    ("dtype", "union", "gated", "biases", "tokens"),
    [
        (torch.bfloat16, False, True, True, 1),
        (torch.bfloat16, True, False, False, 70),
        (torch.float32, True, True, False, 300),
    ],
)
def test_every_kernel_compiles_and_fits(
    dtype: torch.dtype, union: bool, gated: bool, biases: bool, tokens: int, compiled: dict[str, Any]
) -> None:
    ffn = ffn_of(64, dtype, union=union, gated=gated, biases=biases)
    x_TD = torch.randn(tokens, 64).to(dtype)
    with torch.no_grad():
        choice = ffn.choice(x_TD)
        rows(ffn, x_TD, *choice)
        grouped(ffn, x_TD, *choice)
    assert compiled.keys() == {"rows_hidden", "rows_down", "grouped_hidden", "grouped_down"}
    for name, kernel in compiled.items():
        assert kernel.asm.keys() & {"cubin", "hsaco"}, name
        assert kernel.metadata.shared <= SHARED_BYTES, name
