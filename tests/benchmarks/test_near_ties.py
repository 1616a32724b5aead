"""Near ties of routers, bf16 beside fp32: what is forced is computed, and figures are paired.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from benchmarks.near_ties import Converted, Ties, difference, percent, rounded_inputs, table, verdict

import moesaic
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.cast import cast_copy
from tests.tiny_models import build_tiny

IDS_NW = torch.arange(4 * 24).view(4, 24) * 7 % 290 + 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("ties")
    dense = build_tiny("llama", work / "float32", dtype="float32")
    return {"float32": dense, "bfloat16": cast_copy(dense, work / "bfloat16", "bfloat16")}


@pytest.fixture(scope="module")
def blueprint(folders: dict[str, Path]) -> Blueprint:
    out = folders["float32"].with_name("out")
    return moesaic.convert(folders["float32"], out, method="random", options={"layout": "S1A3E8"}).blueprint


def test_forced_experts_are_computed_with(folders: dict[str, Path], blueprint: Blueprint) -> None:
    single, half = (Converted(folders[dtype], blueprint) for dtype in ("float32", "bfloat16"))
    free, of_single = single.nll(IDS_NW[0])
    assert single.nll(IDS_NW[0], of_single)[0] == free
    others = [((idx_WK + 1) % 7, weight_WK) for idx_WK, weight_WK in of_single]
    forced, would_choose = single.nll(IDS_NW[0], others)
    assert abs(forced - free) > 1e-3
    assert torch.equal(would_choose[0][0], of_single[0][0])  # nothing stands before the first router
    assert single.nll(IDS_NW[0])[0] == free
    assert half.nll(IDS_NW[0], of_single)[0] == pytest.approx(free, rel=1e-2)
    with rounded_inputs(single.model):
        single.nll(IDS_NW[0])
    assert single.nll(IDS_NW[0])[0] == free


def test_the_table_pairs_windows(folders: dict[str, Path], blueprint: Blueprint) -> None:
    lines = [
        {"predicted": 23, "windows": [ties.window(ids_W) for ids_W in IDS_NW[:count]]}
        for ties, count in ((Ties(folders, None), 4), (Ties(folders, blueprint), 3))
    ]
    dense, case = lines
    assert set(dense["windows"][0]) == {"fp32", "bf16"}
    assert all(0 <= window["rechosen"] < 0.5 for window in case["windows"])
    moved = [
        (window["bf16"] - whole["bf16"]) - (window["fp32"] - whole["fp32"])
        for window, whole in zip(case["windows"], dense["windows"], strict=False)
    ]
    found = difference(case, dense, "bf16")
    assert found.ratio == pytest.approx(math.exp(sum(moved) / (3 * 23)))
    row = table({"random": case}, dense)[-1]
    assert row.startswith("| random | 3 | ")
    assert percent(found) in row
    forced = difference(case, dense, "bf16 forced")
    assert forced.low is not None
    assert forced.high is not None
    reach = max(abs(forced.low - 1), abs(forced.high - 1))
    assert f"within {reach:.2%} of fp32, at most {2 * reach:.1%}: equal" in verdict({"random": case}, dense, 2 * reach)
    assert reach > 0
    assert f"more than {reach / 2:.1%}" in verdict({"random": case}, dense, reach / 2)
    assert percent(found, interval=False) == f"{found.ratio - 1:+.2%}"
