"""Conversion straight to a stock architecture, with fitted linear routers; resumed between deciding and writing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.anatomy import read_anatomy
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, VerificationError
from moesaic.jobs import decide, native
from moesaic.jobs.convert import Conversion
from moesaic.jobs.evaluate import evaluate_model
from moesaic.jobs.native import fitting_targets, verify_native
from moesaic.materialise.apply import apply_blueprint
from moesaic.progress import Silent
from moesaic.staging.manifest import MANIFEST_NAME, UNHASHED, check_manifest
from moesaic.targets import TARGETS
from moesaic.targets.glm4_moe import Glm4MoE

CALIBRATION = {"tokens": 256, "window": 64}
LAYOUT = {"layout": "S3A3E8"}
ORACLE: dict[str, Any] = {"method": "cmoe", "options": LAYOUT, "calibration": CALIBRATION, "router": "oracle"}
Tiny = Callable[[str], Path]


class Notes(Silent):
    """Keeps the remarks of a job."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def oracle(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return moesaic.convert(tiny("llama"), tmp_path_factory.mktemp("oracle") / "out", **ORACLE)


@pytest.fixture
def no_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has no room for two models."""
    monkeypatch.setattr(native, "too_large", lambda *_: "two models take more than there is")


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model.float().eval()(input_ids=torch.arange(24)[None] * 11 % 290 + 4, use_cache=False).logits


def fixed_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in UNHASHED - {MANIFEST_NAME}}


def test_an_oracle_router_makes_cmoe_a_stock_model_of_the_same_function(oracle: Conversion, tiny: Tiny) -> None:
    assert oracle.target == "glm4_moe"
    checkpoint = Checkpoint(oracle.output)
    assert checkpoint.config["model_type"] == "glm4_moe"
    assert checkpoint.config["moesaic"]["router"]["mode"] == "oracle"
    assert not (oracle.output / "modeling_moesaic.py").exists()
    assert check_manifest(oracle.output) > 0

    dense = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    apply_blueprint(dense, Blueprint.load(oracle.output), read_anatomy(Checkpoint(tiny("llama")).config))
    expected, actual = logits(dense), logits(AutoModelForCausalLM.from_pretrained(oracle.output))
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_results_and_card_say_what_was_proven_and_what_the_fit_reached(oracle: Conversion) -> None:
    results = json.loads((oracle.output / "results.json").read_text())
    assert results == oracle.results
    assert results["conversion"]["target"] == "glm4_moe"
    fit = results["router_fit"]
    assert fit["sites"].keys() == oracle.blueprint.sites.keys()
    agreements = [site["agreement_oracle"] for site in fit["sites"].values()]
    assert fit["mean"]["agreement_oracle"] == pytest.approx(sum(agreements) / 2)
    assert fit["mean"]["energy_random"] < fit["mean"]["energy"] <= fit["mean"]["energy_oracle"]
    assert results["native_parity"]["tokens"] == 256
    assert results["native_parity"]["mean_kl"] <= 1e-5
    card = (oracle.output / "README.md").read_text()
    assert "glm4_moe" in card
    assert "Fitted routers" in card
    assert "on 256 tokens" in card
    assert "trust_remote_code" not in card


@pytest.mark.usefixtures("no_parity")
@pytest.mark.parametrize("place", ["deciding", "writing"])
def test_interrupted_it_resumes_and_writes_the_same_bytes(
    place: str, oracle: Conversion, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[int] = []
    written: list[int] = []
    decide_layer, layer_tensors = decide._decide_layer, Glm4MoE.layer_tensors

    def visit(done: list[int], layer: int, interrupt: bool) -> None:
        done.append(layer)
        if interrupt and done == [0, 1]:
            raise KeyboardInterrupt

    def deciding(job: Any, layer: int, *rest: Any) -> Any:
        visit(decided, layer, place == "deciding")
        return decide_layer(job, layer, *rest)

    def writing(self: Any, split: Any, layer: int, *rest: Any) -> Any:
        visit(written, layer, place == "writing")
        return layer_tensors(self, split, layer, *rest)

    monkeypatch.setattr(decide, "_decide_layer", deciding)
    monkeypatch.setattr(Glm4MoE, "layer_tensors", writing)
    with pytest.raises(KeyboardInterrupt):
        moesaic.convert(tiny("llama"), tmp_path / "out", **ORACLE)
    assert not (tmp_path / "out").exists()
    done = moesaic.convert(tiny("llama"), tmp_path / "out", **ORACLE)
    assert decided == ([0, 1, 1] if place == "deciding" else [0, 1])
    checked = [0, 1]  # the end check asks for each layer's tensors again
    assert written == ([0, 1, 1] if place == "writing" else [0, 1]) + checked
    assert fixed_files(tmp_path / "out") == fixed_files(oracle.output)
    assert done.results["router_fit"] == oracle.results["router_fit"]
    assert done.results["native_parity_skipped"] == "two models take more than there is"
    assert "have not been checked" in (tmp_path / "out" / "README.md").read_text()


def test_another_router_is_another_conversion(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Glm4MoE, "layer_tensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        moesaic.convert(tiny("llama"), tmp_path / "out", **ORACLE)
    other: dict[str, Any] = ORACLE | {"router": "decisions"}
    with pytest.raises(InputError, match=r"another run: router\.mode"):
        moesaic.convert(tiny("llama"), tmp_path / "out", **other)


@pytest.mark.parametrize(
    ("family", "values", "text"),
    [
        ("gpt2", {"method": "random", "target": "glm4_moe"}, "no gate path"),
        ("llama", {"method": "random", "target": "qwen3_moe"}, "norm of queries and keys"),
        ("llama", {"method": "cmoe", "target": "glm4_moe", "calibration": CALIBRATION}, "--router oracle"),
        ("llama", {"method": "random", "target": "gguf2"}, "unknown target 'gguf2'"),
        ("llama", {"method": "random", "router": "best"}, "router.mode"),
        ("llama", {"method": "random", "router": {"mode": "oracle", "step": 1}}, "router.step"),
    ],
)
def test_targets_that_do_not_fit_are_refused_early(
    family: str, values: dict[str, Any], text: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[int] = []
    decide_layer = decide._decide_layer

    def counted(job: Any, layer: int, *rest: Any) -> Any:
        decided.append(layer)
        return decide_layer(job, layer, *rest)

    monkeypatch.setattr(decide, "_decide_layer", counted)
    with pytest.raises(InputError, match=text) as error:
        moesaic.convert(tiny(family), tmp_path / "out", options=LAYOUT, **values)
    assert text in str(error.value)
    assert len(decided) <= 1, "a hopeless target costs one layer at most"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_parity")
@pytest.mark.parametrize(
    ("family", "method", "options", "target", "note"),
    [
        ("llama", "cmoe", LAYOUT, "moesaic", "--router oracle"),
        ("llama", "mlpmoe", {"branches": 4}, "moesaic", "--target dense"),
        ("gpt2", "random", LAYOUT, "moesaic", "no gate path"),
        ("llama", "static", LAYOUT, "dense", "architecture dense"),
        ("llama", "random", {"layout": "S0A1E5"}, "mixtral", "architecture mixtral"),
        ("llama", "random", {"layout": "S0A2E5"}, "glm4_moe", "architecture glm4_moe"),
    ],
)
def test_auto_takes_a_stock_architecture_that_keeps_the_experts(
    family: str, method: str, options: dict[str, Any], target: str, note: str, tiny: Tiny, tmp_path: Path
) -> None:
    progress = Notes()
    done = moesaic.convert(
        tiny(family), tmp_path / "out", method=method, options=options, calibration=CALIBRATION, progress=progress
    )
    assert done.target == target == Checkpoint(done.output).config["moesaic"]["target"]
    assert any(note in text for text in progress.notes)


@pytest.mark.usefixtures("no_parity")
def test_routers_of_a_given_blueprint_are_fitted(tiny: Tiny, tmp_path: Path) -> None:
    first = moesaic.convert(tiny("llama"), tmp_path / "a", method="cmoe", options=LAYOUT, calibration=CALIBRATION)
    second = moesaic.convert(
        tiny("llama"), tmp_path / "b", blueprint=tmp_path / "a", router="decisions", calibration=CALIBRATION
    )
    assert second.target == "glm4_moe"
    assert second.blueprint.config == first.blueprint.config
    for path, plan in second.blueprint.sites.items():
        assert plan.router.kind == "linear"
        assert torch.equal(plan.packed, first.blueprint.sites[path].packed)
    assert second.results["router_fit"]["mode"] == "decisions"


def test_parity_of_a_changed_folder_fails(oracle: Conversion, tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(oracle.output, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.5}))
    with pytest.raises(VerificationError, match="differs from its blueprint"):
        verify_native(folder, tiny("llama"))


def test_parity_is_refused_where_it_makes_no_sense(oracle: Conversion, tiny: Tiny, tmp_path: Path) -> None:
    own = moesaic.convert(tiny("llama"), tmp_path / "own", method="random", options=LAYOUT, target="moesaic").output
    for folder, baseline, text in (
        (oracle.output, None, "needs the dense model"),
        (oracle.output, tiny("mistral"), "is not the model"),
        (own, tiny("llama"), "of the moesaic architecture"),
        (tiny("llama"), tiny("llama"), "not an output"),
    ):
        with pytest.raises(InputError, match=text):
            verify_native(folder, baseline)


def test_fitting_targets_of_models_and_outputs(oracle: Conversion, tiny: Tiny, tmp_path: Path) -> None:
    own = moesaic.convert(tiny("llama"), tmp_path / "own", method="random", options=LAYOUT, target="moesaic").output
    for folder, some in ((tiny("llama"), "granitemoeshared"), (own, "glm4_moe")):
        fits = fitting_targets(folder)
        assert fits.keys() == TARGETS.keys()
        assert fits[some] == fits["moesaic"] == []
        assert fits["qwen3_moe"]
    assert fits["dense"]
    with pytest.raises(InputError, match="already, glm4_moe"):
        fitting_targets(oracle.output)


def test_a_stock_output_is_evaluated_beside_dense_and_controls(oracle: Conversion, tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(oracle.output, tmp_path / "out")
    results = evaluate_model(folder, baseline=tiny("llama"), window=64, limit=2, controls=True)
    assert results["perplexity"].keys() == {"dense", "model", "static", "random"}
    assert results["active_ffn_fraction"] == pytest.approx(0.75, abs=0.02)
    assert "fidelity" not in results
    assert results["protocol"] in json.loads((folder / "results.json").read_text())["evaluation"]
    check_manifest(folder)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_controls_stand_beside_hierarchical_conversions_too(family: str, tiny: Tiny, tmp_path: Path) -> None:
    done = moesaic.convert(
        tiny(family),
        tmp_path / "out",
        method="cmoe",
        options={"layout": "S1A1E4"},
        calibration={"tokens": 1024, "window": 128},
        hierarchical=True,
    )
    assert done.target == "moesaic"
    results = evaluate_model(done.output, baseline=tiny(family), window=64, limit=2, controls=True)
    assert results["perplexity"].keys() == {"dense", "model", "static", "random"}
    assert results["perplexity"]["static"]["value"] != results["perplexity"]["dense"]["value"]


@pytest.mark.parametrize("sources", [None, ["tiny"]])
def test_the_default_text_is_named_where_routers_of_a_blueprint_are_fitted_on_it(
    sources: list[str] | None, tiny: Tiny, tmp_path: Path
) -> None:
    made = moesaic.convert(
        tiny("llama"), tmp_path / "made", method="random", options={"layout": "S2A2E6"}, target="moesaic"
    )
    calibration = {"tokens": 128, "window": 64} | ({} if sources is None else {"sources": sources})
    notes = Notes()
    moesaic.convert(
        tiny("llama"),
        tmp_path / "fitted",
        blueprint=made.output,
        router="oracle",
        target="moesaic",
        calibration=calibration,
        progress=notes,
    )
    assert ("routers are fitted on mix, the default text" in notes.notes) == (sources is None)
