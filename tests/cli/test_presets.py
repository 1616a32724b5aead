"""Presets, and the method that a command takes where none is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_a_recipe_is_run_by_its_name_and_by_its_file(tiny: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    code, out, _ = run("plan", tiny("llama"), "--preset", "neuron-experts", "--active", "0.25", "--json")
    assert (code, json.loads(out)["active_ffn_fraction"]) == (0, pytest.approx(0.25, abs=0.02))
    code, out, _ = run("presets", "neuron-experts")
    (tmp_path / "run.yaml").write_text(out)
    _, from_file, _ = run("plan", tiny("llama"), "--config", tmp_path / "run.yaml", "--json")
    _, by_name, _ = run("plan", tiny("llama"), "--preset", "neuron-experts", "--json")
    same = ("method", "active_ffn_fraction", "router_bytes", "target")  # others depend on the machine's moment
    assert [json.loads(from_file)[name] for name in same] == [json.loads(by_name)[name] for name in same]
    code, _, err = run("plan", tiny("llama"), "--preset", "nothing")
    assert (code, "unknown preset 'nothing'" in err) == (1, True)


def test_the_command_says_what_it_chose(tiny: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    code, _, err = run("convert", tiny("llama"), tmp_path / "out", "--active", "0.25")
    assert code == 0
    assert "method neuron_experts at 25% active" in err
    code, _, err = run("convert", tiny("llama"), tmp_path / "g.gguf")
    assert (code, "--to gguf" in err) == (1, True)
