"""``moesaic verify --parity`` and vLLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.evaluate.vllm import PYTHON_VARIABLE
from tests.tiny_models import build_tiny

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return build_tiny("llama", tmp_path / "dense", hidden_size=128)  # heads of 32: vLLM has no narrower


@pytest.fixture
def stock(run: Run, dense: Path, tmp_path: Path) -> Path:
    out = tmp_path / "stock"
    code, _, err = run("convert", dense, out, "--method", "random", "--layout", "S2A2E7", "--target", "glm4_moe")
    assert code == 0, err
    return out


def test_it_says_that_vllm_is_not_compared(run: Run, dense: Path, stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # what find_spec sees where it is not installed
    code, out, err = run("verify", stock, "--baseline", dense, "--parity", "--windows", 1)
    assert code == 0, err
    assert "stock transformers against the blueprint" in out
    assert "vLLM: not compared" in out
    assert "vllm_parity" not in json.loads((stock / "results.json").read_text())


def test_an_interpreter_that_is_none_is_refused_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run("verify", tmp_path, "--parity", "--vllm-python", tmp_path / "absent")
    assert code == 1
    assert "absent is no Python interpreter" in err
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "other"))
    code, _, err = run("verify", tmp_path, "--parity")
    assert code == 1
    assert "other is no Python interpreter" in err


@pytest.mark.parametrize("option", [("--vllm-python", sys.executable), ("--windows", 2)])
def test_what_is_for_parity_is_refused_without_it(run: Run, tmp_path: Path, option: tuple[str, object]) -> None:
    code, _, err = run("verify", tmp_path, *option)
    assert code == 1
    assert f"error: {option[0]} is for --parity" in err
    assert "hint: add --parity" in err


@pytest.mark.engines
def test_vllm_is_compared_where_it_is(run: Run, dense: Path, stock: Path) -> None:
    code, out, err = run("verify", stock, "--baseline", dense, "--parity", "--windows", 1, "--json")
    assert code == 0, err
    parity = json.loads(out)["vllm_parity"]
    assert parity["engine"].startswith("vLLM ")
    assert parity["tokens"] == 256
    assert parity["max_delta"] <= 1e-4
    assert json.loads((stock / "results.json").read_text())["vllm_parity"] == parity
