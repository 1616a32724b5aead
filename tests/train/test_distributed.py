"""Two gloo processes, DDP and FSDP, interrupted and resumed, learn what one process learns with both batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moesaic.train.loop import BEST_NAME, STATE_NAME, read_log
from tests.train.processes import FSDP, two_processes
from tests.train.tasks import run


@pytest.mark.parametrize("environment", [pytest.param({}, id="ddp"), pytest.param(FSDP, id="fsdp")])
def test_two_processes_learn_what_one_does_with_both_batches(environment: dict[str, str], tmp_path: Path) -> None:
    one, _ = run(tmp_path / "one", batch=8)
    two_processes("tests.train.tasks", environment, tmp_path / "two")
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
