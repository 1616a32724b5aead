"""The check of a GPU starts without one: it has to work the first time that there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from benchmarks.gpu_models import FORMS, WHOLE

ROOT = Path(__file__).parents[2]


def gpu(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280)


def test_a_dry_run_measures_every_form_and_finds_it_right(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = gpu("--dry-run", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["conditions"]["dry_run"] is found["conditions"]["right"] is True
    assert [(row["form"], row["tokens"]) for row in found["ffn"]] == [(form, t) for t in (1, 4) for form in FORMS]
    assert {row["right"] for row in found["ffn"] if row["tokens"] == 4} == {True}
    triton = {"triton_rows", "triton_grouped"} if find_spec("triton") else set()
    for row in found["ffn"]:
        assert row["ms"].keys() >= {"dense", "chosen", "masked", "sorted"} | triton
    contenders = {(row["what"], row["contender"]) for row in found["model"]}
    assert contenders >= {(what, name) for what in ("prefill", "decode") for name in ("dense", *WHOLE)}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU: it would be measured")
def test_without_a_gpu_one_line_says_so() -> None:
    done = gpu()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("error: there is no cuda:0 here; --dry-run needs none")
