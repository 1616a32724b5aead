"""Tests that need a process of their own, because they change what a process imports or how torch behaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SECONDS = 560  # on a busy machine; mark such tests `timeout(600)`
ROOT = Path(__file__).parents[1]


def run_tests(file: Path, **environment: str) -> None:
    """Run the tests of a file that is not collected otherwise. All must pass, and none may be skipped."""
    options = ["-x", "-rs", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SKIPPED" not in done.stdout, done.stdout
