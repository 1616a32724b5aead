"""The demonstration, small: every row is there, and the words come from a model that still speaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.jobs.demo import demo


@pytest.mark.real
@pytest.mark.timeout(900)
def test_the_demo_converts_measures_and_speaks(tmp_path: Path) -> None:
    done = demo(tmp_path, windows=1, tokens=1024)
    rows = {row.model: row for row in done.rows}
    assert list(rows) == [
        "dense",
        "cmoe S3A3E8",
        "mlpmoe, 32 slices",
        "token clusters",
        "neuron experts",
        "control: static",
        "control: random",
    ]
    assert rows["dense"].ratio == 1.0
    assert rows["mlpmoe, 32 slices"].ratio == pytest.approx(1.0, abs=1e-3)  # slicing is exact
    assert rows["control: random"].ratio > rows["control: static"].ratio > rows["token clusters"].ratio > 1
    for label in ("cmoe S3A3E8", "token clusters", "control: static", "control: random"):
        assert rows[label].active == pytest.approx(0.75, abs=0.05)
    assert rows["neuron experts"].active == pytest.approx(0.5, abs=1e-3)
    assert 1 < rows["neuron experts"].ratio < rows["token clusters"].ratio
    assert all(row.prefill > 0 and row.decode > 0 for row in done.rows)
    assert done.sentence
    assert [folder.is_dir() for folder in done.outputs] == [True] * 4
