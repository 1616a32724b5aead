"""One evaluation, end to end on a tiny model: everything stands beside the dense model under one protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

import moesaic
from moesaic.errors import InputError
from moesaic.progress import Silent


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
        output,
        baseline=tiny("llama"),
        text=text,
        window=64,
        limit=3,
        controls=True,
        speed=True,
        proxy=True,
        dtype="fp32",
    )
    assert re.fullmatch(r"ppl\[held-out\.txt@[0-9a-f]{8} w64 n=3\]", results["protocol"])
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
    results = moesaic.evaluate_model(tiny("gpt2"), text=long, dtype="fp32")
    assert results["protocol"].endswith(" w1024 n=all]")


def test_controls_need_the_dense_model(output: Path, text: Path) -> None:
    with pytest.raises(InputError, match="controls need the dense model"):
        moesaic.evaluate_model(output, text=text, window=64, controls=True)


def test_what_was_measured_before_stays_and_texts_of_one_name_are_told_apart(
    tiny: Callable[[str], Path], output: Path, text: Path, tmp_path: Path
) -> None:
    def stored(name: str) -> dict[str, Any]:
        return json.loads((output / "results.json").read_text())["evaluation"][name]

    first = moesaic.evaluate_model(output, baseline=tiny("llama"), text=text, window=48, limit=2)
    moesaic.evaluate_model(output, text=text, window=48, limit=2, fidelity=False)
    assert stored(first["protocol"]) == first
    other = tmp_path / text.name
    other.write_text("The night train leaves the valley behind. " * 40, encoding="utf-8")
    second = moesaic.evaluate_model(output, text=other, window=48, limit=2)
    assert second["protocol"] != first["protocol"]
    assert stored(first["protocol"]) == first


def test_a_protocol_names_the_windows_that_were_read(output: Path, text: Path) -> None:
    every = moesaic.evaluate_model(output, text=text, window=64, full=True, dtype="fp32")
    more = moesaic.evaluate_model(output, text=text, window=64, limit=1000, dtype="fp32")
    assert more["protocol"] == every["protocol"]
    assert every["protocol"].endswith(" w64 n=all]")
    with pytest.raises(InputError, match="0 tokens"):
        moesaic.evaluate_model(output, text=text, window=0)


def test_results_that_cannot_be_saved_are_returned(output: Path, text: Path) -> None:
    class Notes(Silent):
        said: ClassVar[list[str]] = []

        def note(self, message: str) -> None:
            self.said.append(message)

    (output / "results.json.tmp").mkdir()  # where the file is written first
    try:
        results = moesaic.evaluate_model(output, text=text, window=40, limit=2, progress=Notes())
    finally:
        (output / "results.json.tmp").rmdir()
    assert results["perplexity"]["model"]["value"] > 1
    assert any("not saved" in note for note in Notes.said)
