"""``targets``, ``export``, ``verify --parity``, and what ``plan`` and ``convert`` say of targets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.errors import VerificationError
from moesaic.targets import TARGETS

Tiny = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]


def test_a_conversion_is_exported_and_proven(run: Run, tiny: Tiny, tmp_path: Path) -> None:
    own, stock = tmp_path / "own", tmp_path / "stock"
    convert = ("convert", tiny("llama"), own, "--method", "random", "--layout", "S2A2E7", "--target", "moesaic")
    assert run(*convert)[0] == 0

    code, out, _ = run("targets", own, "--json")
    assert code == 0
    fits = json.loads(out)
    assert fits["glm4_moe"] == []
    assert "norm of queries and keys" in fits["qwen3_moe"][0]

    code, out, _ = run("export", own, stock, "--to", "glm4_moe", "--set", "exact_weights=true")
    assert code == 0
    assert "glm4_moe" in out
    assert "mean KL" in out
    made = json.loads((stock / "config.json").read_text())["moesaic"]
    assert made["target_options"]["exact_weights"] is True

    code, out, err = run("verify", stock, "--baseline", tiny("llama"), "--parity", "--windows", "2", "--json")
    assert code == 0, err
    parity = json.loads(out)["native_parity"]
    assert parity["tokens"] == 512
    assert parity["exact"] is True
    assert json.loads((stock / "results.json").read_text())["native_parity"] == parity

    assert run("verify", stock, "--parity")[0] == 1
    assert run("export", own, tmp_path / "no", "--to", "qwen3_moe")[0] == 1
    assert not (tmp_path / "no").exists()


def test_a_stock_folder_becomes_a_gguf(run: Run, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    code, out, err = run("export", tiny("llama"), file, "--to", "gguf", "--dtype", "f32", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["bytes"] == file.stat().st_size
    assert report["llama_cpp_parity"] is None or report["llama_cpp_parity"]["mean_kl"] <= 1e-4
    for wrong in (("--to", "glm4_moe", "--dtype", "f32"), ("--to", "gguf", "--restart")):
        code, _, err = run("export", tiny("llama"), tmp_path / "other.gguf", *wrong)
        assert code == 1
        assert wrong[2] in err


def test_a_gguf_that_computes_something_else_does_not_stay(
    run: Run, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*_given: object) -> None:
        raise VerificationError("differs")

    monkeypatch.setattr("moesaic.evaluate.gguf_parity.check_gguf", differs)
    code, _, err = run("export", tiny("llama"), tmp_path / "model.gguf", "--to", "gguf")
    assert (code, err.splitlines()[-1]) == (3, "error: differs")
    assert not list(tmp_path.iterdir())


def test_targets_are_listed_and_a_model_without_any_has_its_reason(run: Run, tiny: Tiny) -> None:
    code, out, _ = run("targets")
    assert code == 0
    assert all(name in out for name in TARGETS)
    code, out, _ = run("targets", tiny("gpt2"))
    assert code == 0
    assert "no gate path" in out
    code, _, err = run("targets", "nowhere")
    assert code == 1
    assert "nowhere" in err


@pytest.mark.parametrize(
    ("family", "options", "remark"),
    [
        ("llama", (), "--router oracle"),
        ("llama", ("--router", "oracle"), "written as glm4_moe where attention and norms fit"),
        ("llama", ("--target", "glm4_moe", "--router", "decisions"), "written as glm4_moe, for transformers, vLLM"),
        ("gpt2", (), "no gate path"),
        ("gemma2", ("--target", "moesaic"), "trust_remote_code"),
    ],
)
def test_plan_says_what_will_load_the_output(
    family: str, options: tuple[str, ...], remark: str, run: Run, tiny: Tiny
) -> None:
    code, out, _ = run("plan", tiny(family), "--layout", "S3A3E8", *options)
    assert code == 0
    assert any(remark in line for line in out.splitlines())


def test_a_router_of_the_settings_file_takes_its_mode_from_the_flag(run: Run, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "router: {mode: oracle, steps: 0}\ncalibration: {tokens: 128, window: 64}\ntarget: moesaic\n"
    )
    code, out, _ = run(
        "convert", tiny("llama"), tmp_path / "out", "--config", tmp_path / "s.yaml", "--router", "decisions"
    )
    assert code == 0
    assert "linear routers: " in out
    made = json.loads((tmp_path / "out" / "config.json").read_text())["moesaic"]
    assert made["router"]["mode"] == "decisions"
    assert made["router"]["steps"] == 0
