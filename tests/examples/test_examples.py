"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from examples import compare_methods, convert_and_measure, generate

SMALL = ["--windows", "2", "--window", "64"]


def test_convert_and_measure_then_generate(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    convert_and_measure.main([str(tiny("llama")), str(out), *SMALL])
    said = capsys.readouterr().out
    assert "2 FFNs, architecture moesaic" in said
    assert "times the dense model's perplexity" in said
    assert 'class="token"' in (out / "report.html").read_text()
    assert len(generate.main([str(out), "The harbour", "--tokens", "5"])) >= len("The harbour")


def test_compare_methods(tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "several"
    methods = ["--methods", "neuron_experts", "static"]
    compare_methods.main([str(tiny("llama")), str(folder), *SMALL, *methods])
    assert "neuron_experts against static" in (folder / "compared.html").read_text()
    rows = capsys.readouterr().out
    assert "over neuron_experts [95 %]" in rows
