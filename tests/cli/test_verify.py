"""What ``moesaic verify`` says; ``--parity`` and vLLM."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moesaic
from moesaic.checkpoint.loading import load_model
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


def test_it_speaks_in_words_and_says_what_was_not_compared(run: Run, dense: Path, tmp_path: Path) -> None:
    out = moesaic.convert(dense, tmp_path / "out", method="neuron_experts").output
    code, alone, err = run("verify", out)
    assert code == 0, err
    assert "not compared with the dense model: give --baseline MODEL\nok\n" in alone
    assert re.search(r"^files: \d+ as manifest.json has them, by sha256$", alone, re.MULTILINE)
    assert re.search(r"^logits: finite on a prompt of 32 tokens, the largest \d+\.\d$", alone, re.MULTILINE)
    assert "FFNs: 2 converted, each a partition of the dense FFN's neurons" in alone
    code, beside, err = run("verify", out, "--baseline", dense)
    assert code == 0, err
    assert "compared with the dense model: tensors and outputs of all layers\n" in beside
    assert re.search(r"^all experts on against dense: relative logit difference \d\.\de[-+]\d\d$", beside, re.MULTILINE)
    assert re.search(r"^written FFNs against the blueprint's oracle: relative difference \S+$", beside, re.MULTILINE)
    assert "not compared" not in beside
    for text in (alone, beside):
        assert not re.search(r"None|True|False|all_on|\d\.\d{5}", text)
    code, data, _ = run("verify", out, "--baseline", dense, "--json")
    assert code == 0
    assert set(json.loads(data)) >= {"files", "tensors", "sites", "partition", "logits", "all_on", "oracle", "checked"}


def test_it_says_why_all_experts_on_are_not_compared(run: Run, dense: Path, tmp_path: Path) -> None:
    options = {"weights": "int8"}
    out = moesaic.convert(dense, tmp_path / "out", method="neuron_experts", options=options).output
    code, text, err = run("verify", out, "--baseline", dense)
    assert code == 0, err
    assert "FFNs: 2 converted, no partition of the dense model\n" in text
    assert "all experts on not compared with dense: this is no partition" in text
    assert "written FFNs against the blueprint's oracle" in text


def test_a_folder_that_transformers_saved_is_not_sent_to_its_dense_model(run: Run, dense: Path, tmp_path: Path) -> None:
    out = moesaic.convert(dense, tmp_path / "out", method="random", options={"layout": "S2A2E7"}, target="moesaic")
    load_model(out.output, "auto").save_pretrained(tmp_path / "saved")
    code, text, err = run("verify", tmp_path / "saved")
    assert code == 0, err
    assert "files: not hashed" in text
    assert "not compared with the dense model: transformers saved it after the conversion" in text
    assert "--baseline" not in text


def test_of_a_large_model_it_says_what_was_left_out(
    run: Run, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = moesaic.convert(dense, tmp_path / "out", method="random", options={"layout": "S2A2E7"}, target="moesaic")
    monkeypatch.setattr("moesaic.evaluate.parity.COMPUTED", 1)
    code, text, err = run("verify", out.output)
    assert code == 0, err
    assert "logits: not computed, as the model is large; --full computes them" in text
    code, text, err = run("verify", out.output, "--baseline", dense)
    assert code == 0, err
    assert "logits" not in text.replace("relative logit difference", "")
    assert "compared with the dense model: tensors" in text
