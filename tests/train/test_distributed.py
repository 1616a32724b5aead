"""Two gloo processes, DDP and FSDP, interrupted and resumed, learn what one process learns with both batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moesaic.train.loop import BEST_NAME, STATE_NAME, read_log
from tests.train.tasks import run

ROOT = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


def two_processes(folder: Path, environment: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), **environment}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.train.tasks", str(folder)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]


@pytest.mark.parametrize("environment", [pytest.param({}, id="ddp"), pytest.param(FSDP, id="fsdp")])
def test_two_processes_learn_what_one_does_with_both_batches(environment: dict[str, str], tmp_path: Path) -> None:
    one, _ = run(tmp_path / "one", batch=8)
    two_processes(tmp_path / "two", environment)
    ours, theirs = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)
        if "held_out" in a:
            assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-5)
    kept = load_file(tmp_path / "two" / BEST_NAME)
    assert kept.keys() == one.trained().keys()  # whole tensors, whatever they were cut into
    for name, tensor in one.trained().items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert load_file(tmp_path / "two" / STATE_NAME).keys() == load_file(tmp_path / "one" / STATE_NAME).keys()
