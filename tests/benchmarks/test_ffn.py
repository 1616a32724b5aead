"""The benchmark of one FFN goes on where it stopped, and its page counts what reaches an aim."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.ffn_forms import ALL_ROWS, NEURONS, OURS
from benchmarks.ffn_page import markdown
from benchmarks.gpu_models import SHAPES, Shape

from benchmarks import ffn

SMALL = Shape(64, 256)


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> dict[str, Any]:
    where = ["--log", str(tmp_path / "log.jsonl"), "--report", str(tmp_path / "ffn"), "--threads", "1"]
    monkeypatch.setattr(
        sys, "argv", ["ffn", "--shapes", SMALL.ffn, "--dtypes", "bfloat16", "--rounds", "1", *where, *options]
    )
    ffn.main()
    return json.loads((tmp_path / "ffn.json").read_text())


def test_a_second_run_measures_only_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    monkeypatch.setattr(ffn, "ORDER", (("small", "bfloat16"),))
    monkeypatch.setattr(ffn, "TOGETHER", 1)
    first = run(monkeypatch, tmp_path, "--tokens", "1", "--paths")["rows"]
    neurons = {f"neuron experts {percent} %" for percent in NEURONS}
    assert first[0]["times_dense"].keys() >= {*OURS, *neurons, "transformers, eager"}
    assert any(name.endswith(", masked") for name in first[0]["times_dense"])
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"conditions": {"thr')  # a run that was killed
    both = run(monkeypatch, tmp_path, "--tokens", "1", "16")["rows"]
    assert both[0] == first[0]
    assert [row["tokens"] for row in both] == [1, 16]
    assert not both[1]["times_dense"].keys() & neurons
    assert "| tokens | 1 | 16 |" in (tmp_path / "ffn.md").read_text()
    assert len(run(monkeypatch, tmp_path, "--minutes", "0", "--tokens", "1", "16", "64")["rows"]) == 2


def test_the_page_counts_what_reaches_an_aim() -> None:
    name = "CMoE S2A2E8, 50 %"
    row = {
        **{"shape": SMALL.ffn, "dtype": "bfloat16", "tokens": 1, "rounds": 3, "path": {name: "rows"}},
        "micros": {"torch dense": [9.0, 10.0], ALL_ROWS: [5.0, 6.0], name: [2.0, 3.2]},
        "times_dense": {ALL_ROWS: [1.8, 1.67], name: [4.5, 3.1]},
        "limits": {name: [2.0, 2.0]},
    }
    page = markdown([row], {"threads": 1})
    assert "1.5/p times torch dense | 1 of 1 | 3.10, 3.00" in page
    assert f"0.85/p times our kernel with all rows | 1 of 1 | {6 / 3.2:.2f}, 1.70" in page
    assert "| CMoE S2A2E8, 50 % | 4.50 / **3.10** rows |" in page
