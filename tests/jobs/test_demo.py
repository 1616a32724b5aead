"""The demonstration, small: every row is there, and the words come from a model that still speaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.jobs.demo import SPEAKER, demo


@pytest.mark.real
@pytest.mark.timeout(900)
def test_the_demo_converts_measures_and_speaks(tmp_path: Path) -> None:
    done = demo(tmp_path, windows=1, tokens=1024)
    rows = {row.model: row for row in done.rows}
    assert list(rows) == ["dense", SPEAKER, "neuron experts, 25 %", "cmoe S2A2E8", "control: static, 50 %"]
    assert rows["dense"].ratio == rows["dense"].faster == 1.0
    for label in (SPEAKER, "cmoe S2A2E8", "control: static, 50 %"):
        assert rows[label].active == pytest.approx(0.5, abs=0.01)
    assert rows["neuron experts, 25 %"].active == pytest.approx(0.25, abs=1e-3)
    assert 1 < rows[SPEAKER].ratio < rows["neuron experts, 25 %"].ratio < rows["control: static, 50 %"].ratio
    assert all(row.prefill > 0 and row.decode > 0 for row in done.rows)
    assert all(("perplexity" in row.gain) == (row.model != "dense") for row in done.rows)
    assert done.sentence
    assert [folder.is_dir() for folder in done.outputs] == [True] * 3
    assert done.plot is not None
    assert done.plot.read_text(encoding="utf-8").count("<path") > 5
