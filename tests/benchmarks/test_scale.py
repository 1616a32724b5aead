"""Conversions of large models: what is measured, and what is told of models without weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.scale import CONFIGS, PeakMemory, costs, measure, page


def test_a_case_is_measured_beside_its_forecast(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    row = measure("static", tiny("llama"), tmp_path / "out", 64, "2GB", torch.get_num_threads())
    assert not (tmp_path / "out").exists()
    assert row["peak_bytes"] > 1e8
    assert row["forecast_bytes"] > 1e8
    assert "| static | 64 | 2GB |" in page([row])


def test_the_peak_is_seen() -> None:
    with PeakMemory() as watched:
        held = torch.ones(200 * 2**20 // 4)
        time.sleep(0.3)  # it is looked at 50 times a second
        del held
    assert watched.peak > 200 * 2**20


def test_configs_alone_are_enough_for_the_table() -> None:
    lines = costs().splitlines()[2:]
    assert {line.split(" | ")[0].removeprefix("| ") for line in lines} == set(CONFIGS)
    memory = [float(line.split(" | ")[5]) for line in lines if " mlpmoe " in line]
    assert memory == sorted(memory)
