"""The main job, end to end on tiny models: every family by every kind of method, reloaded by transformers, equal to
dense.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.nn.moesaic_path_rows import Rows
from moesaic.staging.manifest import MANIFEST_NAME, UNHASHED
from tests.tiny_models import FAMILIES, MOE_FAMILIES, VARIANTS

CALIBRATION = {"tokens": 256, "window": 64}
ALL_ON = {"cmoe": {"layout": "S2A3E5"}, "mlpmoe": {"branches": 5, "order": "strided"}}  # 5 does not divide 37
ROUTED = {
    "cmoe": {"layout": "S3A3E8"},
    "moefication": {"layout": "S0A3E8"},
    "llama_moe": {"layout": "S0A3E8"},
    "random": {"layout": "S3A3E8"},
    "static": {"layout": "S3A3E8"},
}
Tiny = Callable[[str], Path]


@torch.inference_mode()
def logits(folder: Path, **options: object) -> torch.Tensor:
    moesaic.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    ids = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=False).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance, f"relative difference {difference:.1e}"


@pytest.mark.parametrize("method", ALL_ON)
@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_all_experts_active_is_the_dense_model(tiny: Tiny, tmp_path: Path, family: str, method: str) -> None:
    done = moesaic.convert(
        tiny(family), tmp_path / "out", method=method, options=ALL_ON[method], calibration=CALIBRATION
    )
    assert all(plan.is_partition for plan in done.blueprint.sites.values())
    assert_close(logits(tmp_path / "out"), logits(tiny(family)))
    assert done.results["parity"]["all_on"] <= 1e-5


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_hierarchical_with_all_inner_experts_active_is_the_original(tiny: Tiny, tmp_path: Path, family: str) -> None:
    done = moesaic.convert(
        tiny(family),
        tmp_path / "out",
        method="cmoe",
        options={"layout": "S1A3E4"},
        calibration={"tokens": 1024, "window": 128},
        hierarchical=True,
    )
    assert any(plan.experts for plan in done.blueprint.sites.values())
    assert_close(logits(tmp_path / "out"), logits(tiny(family), experts_implementation="eager"))


def test_hierarchical_leaves_experts_whole_that_saw_too_few_tokens(tiny: Tiny, tmp_path: Path) -> None:
    done = moesaic.convert(
        tiny("mixtral"),
        tmp_path / "out",
        method="cmoe",
        options={"layout": "S1A1E4"},
        calibration={"tokens": 192, "window": 64},
        hierarchical=True,
    )
    whole = [path for path, plan in done.blueprint.sites.items() if not plan.experts]
    split = [path for path, plan in done.blueprint.sites.items() if plan.experts]
    assert whole or not split  # 192 tokens, top-2 of 4: an expert of 40 neurons needs 160, and sees 96 on average
    assert logits(tmp_path / "out").isfinite().all() if done.blueprint.sites else True


@pytest.mark.parametrize("method", ROUTED)
def test_every_method_gives_a_model_that_runs_and_differs_from_dense(tiny: Tiny, tmp_path: Path, method: str) -> None:
    done = moesaic.convert(
        tiny("qwen2"),
        tmp_path / "out",
        method=method,
        options=ROUTED[method],
        calibration=CALIBRATION,
        target="moesaic",
    )
    out, dense = logits(tmp_path / "out"), logits(tiny("qwen2"))
    assert out.isfinite().all()
    assert (out - dense).abs().max() > 1e-3
    assert done.results["parity"]["oracle"] <= 1e-5


def test_two_runs_write_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("a", "b"):
        moesaic.convert(
            tiny("llama"), tmp_path / name, method="cmoe", options={"layout": "S3A3E8"}, calibration=CALIBRATION
        )
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in set(files) - (UNHASHED - {MANIFEST_NAME}):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_dense_layers_stay_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    options = {"layout": "S3A3E8"}
    moesaic.convert(
        tiny("llama"), tmp_path / "out", method="random", options=options, dense_layers=[-1], target="moesaic"
    )
    source, out = Checkpoint(tiny("llama")), Checkpoint(tmp_path / "out")
    kept = [name for name in source.names if ".layers.1." in name]
    assert kept
    assert all(torch.equal(source.tensor(name), out.tensor(name)) for name in kept)
    assert list(out.config["ffn_sites"]) == ["model.layers.0.mlp"]


def test_a_blueprint_can_be_applied_again(tiny: Tiny, tmp_path: Path) -> None:
    first = moesaic.convert(
        tiny("llama"), tmp_path / "a", method="cmoe", options={"layout": "S3A3E8"}, calibration=CALIBRATION
    )
    second = moesaic.convert(tiny("llama"), tmp_path / "b", blueprint=tmp_path / "a")
    assert Blueprint.load(tmp_path / "b").digest() == first.blueprint.digest() == second.blueprint.digest()
    assert_close(logits(tmp_path / "b"), logits(tmp_path / "a"), 0.0)


def test_the_folder_is_complete_and_says_how_it_was_made(tiny: Tiny, tmp_path: Path) -> None:
    moesaic.convert(tiny("llama"), tmp_path / "out", method="random", options={"layout": "S3A3E8"}, target="moesaic")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "manifest.json", "blueprint.json", "results.json", "README.md", "tokenizer.json"} <= names
    assert not (tmp_path / "out.partial").exists()
    made = json.loads((tmp_path / "out" / "config.json").read_text())["moesaic"]
    assert made["method"] == "random"
    assert made["source"] == Checkpoint(tiny("llama")).fingerprint()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code" in card
    assert str(tmp_path) not in card


def test_an_existing_output_is_not_touched(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists"):
        moesaic.convert(tiny("llama"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_is_decided_does_not_depend_on_a_compiler(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of a MoE get few tokens each, which the compiled kernel would round otherwise than torch."""
    settings: dict[str, Any] = {"method": "cmoe", "calibration": CALIBRATION, "hierarchical": True}
    options = {"layout": "S2A2E6"}
    made = moesaic.convert(tiny("mixtral"), tmp_path / "kernel", options=options, **settings)
    monkeypatch.setattr(Rows, "supports", lambda *_: False)
    without = moesaic.convert(tiny("mixtral"), tmp_path / "torch", options=options, **settings)
    assert made.blueprint.digest() == without.blueprint.digest()
