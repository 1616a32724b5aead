"""The paths for GPUs, without a GPU: computed by Triton's interpreter, and compiled for GPUs that are not there.

Both need Triton and a process of their own, as an environment variable decides which it is when Triton is imported.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.children import run_tests

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton, a wheel of 286 MB, is not installed: pip install triton (Linux)"
)


@needs_triton
@pytest.mark.timeout(600)
def test_the_kernels_compute_what_the_oracle_says(tmp_path: Path) -> None:
    cache = str(tmp_path)
    run_tests(HERE / "triton_interpreted.py", TRITON_INTERPRET="1", TRITON_CACHE_DIR=cache, HF_MODULES_CACHE=cache)


@needs_triton
@pytest.mark.timeout(600)
def test_the_kernels_compile_for_gpus_of_two_makers(tmp_path: Path) -> None:
    run_tests(HERE / "triton_compiled.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_without_a_gpu_triton_is_not_even_imported() -> None:
    code = (
        "import sys, torch; from tests.nn.test_rows import ffn_of\n"
        "with torch.no_grad(): ffn_of(16)(torch.randn(2, 16).bfloat16())\n"
        "print('moesaic.nn.moesaic_path_triton' in sys.modules, 'moesaic.nn.moesaic_triton' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parents[1], capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stdout.split() == ["True", "False"]
