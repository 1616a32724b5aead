"""Conversion under a budget over layers: the layer that matters stays dense, totals are kept, nothing is measured
twice, and what cannot be is refused before any work.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import moesaic
from moesaic.adjust.allocation_config import MODES, AllocationConfig
from moesaic.errors import InputError
from moesaic.jobs.allocate import with_allocation
from moesaic.jobs.decide import decide
from moesaic.jobs.job import prepare
from moesaic.jobs.plan import plan
from moesaic.jobs.request import check_request
from moesaic.jobs.settings import ConvertSettings
from moesaic.progress import Silent
from moesaic.targets import TARGETS, choose_target
from moesaic.targets.write import read_split
from tests.tiny_models import build_tiny

LAYERS, D_FF = 4, 64
CLUSTERS: dict[str, Any] = {
    "method": "token_clusters",
    "options": {"active": 0.75, "experts": 4},
    "calibration": {"tokens": 256, "window": 32, "compute_dtype": "float32"},
}
Planted = Callable[[int], Path]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """``planted(2)``: a model in which the FFN of layer 2 writes 150 times as much as the others."""
    made: dict[int, Path] = {}

    def folder_of(layer: int) -> Path:
        if layer not in made:
            folder = tmp_path_factory.mktemp(f"planted{layer}") / "model"
            build_tiny("llama", folder, d_ff=D_FF, num_hidden_layers=LAYERS)
            path = folder / "model.safetensors"
            tensors = load_file(path)
            for index in range(LAYERS):
                tensors[f"model.layers.{index}.mlp.down_proj.weight"] *= 3.0 if index == layer else 0.02
            save_file(tensors, path, {"format": "pt"})
            made[layer] = folder
        return made[layer]

    return folder_of


class Labels(Silent):
    """Notes the phases, and stops the run in the phase ``stop_in``."""

    def __init__(self, stop_in: str = "-") -> None:
        self.labels: list[str] = []
        self.stop_in = stop_in

    def start(self, label: str, total: int) -> None:
        self.labels.append(label)

    def advance(self, detail: str = "") -> None:
        if self.stop_in in self.labels[-1]:
            raise KeyboardInterrupt


def used_by(neurons: list[int]) -> dict[str, int]:
    return {f"model.layers.{layer}.mlp": count for layer, count in enumerate(neurons) if count < D_FF}


@pytest.mark.parametrize(("mode", "layer"), [("leading", 0), ("any", 2)])
def test_the_layer_that_matters_stays_dense(planted: Planted, mode: str, layer: int) -> None:
    job = prepare(check_request(planted(layer), ConvertSettings.model_validate(CLUSTERS | {"allocation": mode})))
    made = decide(job)
    neurons = made.config["allocation"]["neurons"]
    dense = [index for index, count in enumerate(neurons) if count == D_FF]
    assert layer in dense
    if mode == "leading":
        assert dense == list(range(len(dense)))
    width = (48 * LAYERS - D_FF * len(dense)) // (LAYERS - len(dense))
    assert set(neurons) == {D_FF, width}
    assert made.config["active"] == 0.75
    assert {path: plan.active_neurons for path, plan in made.sites.items()} == used_by(neurons)


def test_widths_in_the_moesaic_architecture(planted: Planted, tmp_path: Path) -> None:
    values = CLUSTERS | {"target": "moesaic", "allocation": "widths"}
    done = moesaic.convert(planted(2), tmp_path / "out", settings=values)
    allocation = done.blueprint.config["allocation"]
    assert allocation["mode"] == "widths"
    neurons = allocation["neurons"]
    assert neurons[2] == max(neurons) > 48 > min(neurons) >= D_FF / 2  # half is the lowest fraction measured
    assert 0 <= 48 * LAYERS - sum(neurons) < 2  # one step of the grid
    assert {path: plan.active_neurons for path, plan in done.blueprint.sites.items()} == used_by(neurons)
    made = json.loads((tmp_path / "out" / "config.json").read_text())["moesaic"]
    assert made["config"]["allocation"] == allocation
    assert done.results["parity"]["oracle"] <= 1e-5


def test_by_default_a_stock_model_holds_it(planted: Planted) -> None:
    job = prepare(check_request(planted(0), ConvertSettings.model_validate(CLUSTERS | {"allocation": "auto"})))
    made = decide(job)
    split = read_split(job.checkpoint, job.anatomy, made.sites)
    choice = choose_target(split)
    assert choice.name == "glm4_moe"
    config = choice.target.config_json(split, {}, job.settings.target_options)
    assert config["first_k_dense_replace"] == made.config["allocation"]["neurons"].count(D_FF) > 0


def test_the_report_says_what_was_measured(planted: Planted) -> None:
    job = prepare(check_request(planted(2), ConvertSettings.model_validate(CLUSTERS | {"allocation": "any"})))
    report = with_allocation(job, None, Silent()).allocation
    assert report is not None
    assert list(report["kl"]) == ["0.75", "0.5"]
    assert max(range(LAYERS), key=report["kl"]["0.75"].__getitem__) == 2
    assert report["active"] == pytest.approx(0.75, abs=1 / D_FF)
    assert report["active"] <= 0.75
    assert report["expected"] < report["uniform"]
    assert 2 in report["dense_layers"]
    assert json.loads(json.dumps(report)) == report


def test_an_interrupted_run_does_not_measure_again(planted: Planted, tmp_path: Path) -> None:
    values = CLUSTERS | {"allocation": "leading", "target": "moesaic"}
    first, second = Labels(stop_in="deciding"), Labels()
    with pytest.raises(KeyboardInterrupt):
        moesaic.convert(planted(0), tmp_path / "out", settings=values, progress=first)
    assert any("sensitivity" in label for label in first.labels)
    resumed = moesaic.convert(planted(0), tmp_path / "out", settings=values, progress=second)
    assert not any("sensitivity" in label for label in second.labels)
    whole = moesaic.convert(planted(0), tmp_path / "whole", settings=values)
    assert resumed.blueprint.digest() == whole.blueprint.digest()


def test_another_allocation_is_not_resumed(planted: Planted, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        moesaic.convert(
            planted(0), tmp_path / "out", settings=CLUSTERS | {"allocation": "leading"}, progress=Labels("deciding")
        )
    with pytest.raises(InputError, match=r"allocation\.mode"):
        moesaic.convert(planted(0), tmp_path / "out", settings=CLUSTERS | {"allocation": "any"})


def test_static_counts_its_layout_as_the_budget(planted: Planted) -> None:
    values = CLUSTERS | {"method": "static", "options": {"layout": "S1A1E4"}, "target": "moesaic", "allocation": "any"}
    made = decide(prepare(check_request(planted(2), ConvertSettings.model_validate(values))))
    assert "model.layers.2.mlp" not in made.sites
    assert {plan.active_neurons for plan in made.sites.values()} == {(32 * LAYERS - D_FF) // 3}


def test_plan_forecasts_the_measuring(planted: Planted) -> None:
    plain = plan(planted(2), ConvertSettings.model_validate(CLUSTERS))
    report = plan(planted(2), ConvertSettings.model_validate(CLUSTERS | {"allocation": "leading"}))
    assert report.active_ffn_parameters == plain.active_ffn_parameters
    assert report.seconds >= plain.seconds
    assert any("how many leading layers stay dense is measured first" in remark for remark in report.remarks)
    assert any("75.0% and 50.0%" in remark for remark in report.remarks)


@pytest.mark.parametrize(
    ("changes", "says", "hint"),
    [
        ({"method": "cmoe", "options": {}}, "no active fraction", "token_clusters"),
        (
            {"method": "tomoe", "options": {"train": {"held_out": 1, "batch": 1}}},
            "shares its neurons out itself",
            "leave allocation out",
        ),
        ({"options": {"active": 1.0}}, "every neuron is active", "lower active"),
        ({"dense_layers": (0,)}, "both dense_layers and allocation", "chooses the dense layers"),
        ({"target": "mixtral"}, "same FFN in every layer", "glm4_moe"),
        ({"target": "glm4_moe", "allocation": "any"}, "at the start only", "leading"),
        ({"allocation": "widths"}, "different widths", "moesaic"),
        ({"method": "static", "options": {"active": 0.75}}, "as wide as the widest", "moesaic"),
        ({"calibration": {"tokens": 32, "window": 32}}, "too few to tell layers apart", "512"),
    ],
)
def test_what_cannot_be_is_refused(
    planted: Planted, tmp_path: Path, changes: dict[str, Any], says: str, hint: str
) -> None:
    with pytest.raises(InputError, match=says) as refused:
        moesaic.convert(planted(0), tmp_path / "out", settings=CLUSTERS | {"allocation": "auto"} | changes)
    assert hint in str(refused.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_blueprint_leaves_nothing_to_share_out(planted: Planted, tmp_path: Path) -> None:
    decide(prepare(check_request(planted(0), ConvertSettings.model_validate(CLUSTERS)))).save(tmp_path)
    with pytest.raises(InputError, match="says already"):
        prepare(
            check_request(
                planted(0), ConvertSettings.model_validate(CLUSTERS | {"allocation": "auto"}), blueprint=tmp_path
            )
        )


def test_experts_of_a_moe_are_refused(tmp_path: Path) -> None:
    folder = build_tiny("mixtral", tmp_path / "moe")
    settings = ConvertSettings.model_validate(CLUSTERS | {"allocation": "auto", "hierarchical": True})
    with pytest.raises(InputError, match="for dense models"):
        prepare(check_request(folder, settings))


@pytest.mark.parametrize("name", TARGETS)
def test_modes_are_what_the_targets_hold(name: str) -> None:
    held = TARGETS[name].freedom
    for mode in ("leading", "any", "widths"):
        config = AllocationConfig.model_validate({"mode": mode})
        if ["none", "leading", "any", "widths"].index(mode) <= ["none", "leading", "any", "widths"].index(held):
            assert config.mode_for(name) == mode
        else:
            with pytest.raises(InputError, match=name):
                config.mode_for(name)


def test_modes_are_the_options() -> None:
    assert {AllocationConfig.model_validate({"mode": mode}).mode for mode in MODES} == set(MODES)
