"""Two gloo processes learn the masks and routers that one process learns with both batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moesaic.train.loop import STATE_NAME, read_log
from tests.methods.tomoe.worker import run
from tests.train.processes import FSDP, two_processes


@pytest.mark.parametrize(
    ("environment", "width"), [({}, "mean"), ({}, "max"), (FSDP, "mean")], ids=["ddp", "ddp-max", "fsdp"]
)
def test_two_processes_learn_what_one_does(environment: dict[str, str], width: str, tmp_path: Path) -> None:
    run(tmp_path / "one", width)
    two_processes("tests.methods.tomoe.worker", environment, tmp_path / "two", width)
    ours, theirs = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "kd", "active_mean", "coverage"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=2e-5), (a["step"], name)
    one, two = load_file(tmp_path / "one" / STATE_NAME), load_file(tmp_path / "two" / STATE_NAME)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if "router" in name and tensor.is_floating_point():
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
