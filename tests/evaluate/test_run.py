"""One evaluation, end to end on a tiny model: everything stands beside the dense model under one protocol."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import moesaic
from moesaic.errors import InputError


@pytest.fixture(scope="module")
def output(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "out"
    calibration = {"tokens": 256, "window": 64}
    moesaic.convert(tiny("llama"), out, method="cmoe", options={"layout": "S3A3E8"}, calibration=calibration)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text("Ships sail at dawn, and the harbour wakes. " * 40, encoding="utf-8")
    return path


def test_model_dense_and_controls_share_one_protocol(tiny: Callable[[str], Path], output: Path, text: Path) -> None:
    results = moesaic.evaluate_model(
        output, baseline=tiny("llama"), text=text, window=64, limit=3, controls=True, speed=True, proxy=True
    )
    assert results["protocol"] == "ppl[held-out.txt w64 n=3]"
    assert set(results["perplexity"]) == {"dense", "model", "static", "random"}
    for label, row in results["perplexity"].items():
        assert row["value"] > 1
        assert ("ratio_to_dense" in row) == (label != "dense")
    assert results["active_ffn_fraction"] == pytest.approx(0.75, abs=0.03)
    for control in ("static", "random"):
        assert results["perplexity"][control]["active_ffn_fraction"] == pytest.approx(0.75, abs=0.03)
    assert set(results["proxy"]) == {"dense", "model", "static", "random"}
    assert set(results["speed"]) == {"dense", "model"}
    assert len(results["fidelity"]["sites"]) == 2
    stored = json.loads((output / "results.json").read_text())
    assert stored["evaluation"][results["protocol"]]["perplexity"] == results["perplexity"]
    assert "held-out.txt" in (output / "README.md").read_text()
    moesaic.verify(output)  # the evaluation did not touch what the manifest guards


def test_the_dense_model_against_itself_has_ratio_one(tiny: Callable[[str], Path], text: Path) -> None:
    dense = tiny("llama")
    results = moesaic.evaluate_model(dense, baseline=dense, text=text, window=64, limit=2)
    assert results["perplexity"]["model"]["ratio_to_dense"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert not (dense / "results.json").exists()


def test_windows_are_as_long_as_a_short_context(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text(text.read_text() * 3)
    results = moesaic.evaluate_model(tiny("gpt2"), text=long)
    assert results["protocol"] == "ppl[long.txt w1024 n=all]"


def test_controls_need_the_dense_model(output: Path, text: Path) -> None:
    with pytest.raises(InputError, match="controls need the dense model"):
        moesaic.evaluate_model(output, text=text, window=64, controls=True)
