"""The paths for GPUs, without a GPU: computed by Triton's interpreter, and compiled for GPUs that are not there.

Both need Triton and a process of their own, as an environment variable decides which it is when Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton, a wheel of 286 MB, is not installed: pip install triton (Linux)"
)


def child(file: str, cache: Path, **environment: str) -> None:
    """Run the tests of a file that is not collected otherwise; none may be skipped."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-rs", "-p", "no:xdist", "-p", "no:cacheprovider", str(HERE / file)],
        cwd=HERE.parents[1],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
        | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1]


@needs_triton
def test_the_kernels_compute_what_the_oracle_says(tmp_path: Path) -> None:
    child("triton_interpreted.py", tmp_path, TRITON_INTERPRET="1")


@needs_triton
def test_the_kernels_compile_for_gpus_of_two_makers(tmp_path: Path) -> None:
    child("triton_compiled.py", tmp_path, TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1")


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
