"""What a conversion takes where nothing is said, and that all of it works: every method, every recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moesaic
from moesaic.errors import InputError
from moesaic.jobs.plan import plan
from moesaic.jobs.recipes import recipe, recipe_names, summary
from moesaic.jobs.request import check_request
from moesaic.jobs.settings import ConvertSettings
from moesaic.methods import METHODS
from moesaic.options import build
from moesaic.targets import TARGETS
from tests.tiny_models import build_tiny

SHORT: dict[str, dict[str, Any]] = {
    "tomoe": {"train": {"steps": 2, "eval_every": 2}},  # 300 steps by default
    "secret_moe": {"steps": 5},
}
"""Options that shorten training; all else is as it comes."""


def settings(**values: Any) -> ConvertSettings:
    return build(ConvertSettings, values, "settings")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose FFN has the 1,536 neurons of SmolLM2's, and five layers."""
    return build_tiny("llama", tmp_path_factory.mktemp("wide") / "model", d_ff=1536, num_hidden_layers=5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_at_its_defaults(method: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    options = SHORT.get(method, {})
    assert plan(tiny("llama"), method=method).method == method  # with the real number of steps
    made = moesaic.convert(tiny("llama"), tmp_path / "out", method=method, options=options, target="moesaic")
    found = moesaic.evaluate_model(made.output, baseline=tiny("llama"), window=64, limit=2)
    assert found["perplexity"]["model"]["ratio_to_dense"]["ratio"] > 0


def test_a_stock_target_takes_what_it_holds(tiny: Callable[[str], Path], wide: Path) -> None:
    assert settings().method == "neuron_experts"
    assert settings(target="moesaic").method == "neuron_experts"
    assert settings(target="dense").options == {"experts": 1}
    for target in TARGETS:
        chosen = settings(target=target)
        assert chosen.chosen
        if target != "moesaic":
            assert chosen.method == "token_clusters"
    made = check_request(tiny("llama"), settings(target="glm4_moe", options={"active": 0.5}))
    assert made.target == "glm4_moe"
    assert plan(wide, target="glm4_moe", options={"active": 0.5}).active_ffn_fraction == pytest.approx(0.5, abs=0.01)


def test_settings_of_before_mean_what_they_did() -> None:
    assert settings(options={"layout": "S3A3E8"}).method == "cmoe"
    assert settings(options={"markers_per_token": 4}).method == "cmoe"
    assert settings(router="oracle").method == "cmoe"
    named = settings(method="cmoe")
    assert (named.method, named.chosen) == ("cmoe", "")
    assert settings(options={"bits": 3}).method == "neuron_experts"
    assert settings(method="auto").method == "neuron_experts"


def test_a_chosen_method_is_nothing_that_somebody_asked_for(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    first = moesaic.convert(tiny("llama"), tmp_path / "first")
    second = moesaic.convert(tiny("llama"), tmp_path / "second", blueprint=first.output)
    assert second.blueprint.method == "neuron_experts"
    with pytest.raises(InputError, match="a blueprint says already"):
        moesaic.convert(tiny("llama"), tmp_path / "third", blueprint=first.output, method="neuron_experts")


def test_tomoe_keeps_text_to_train_on(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    assert settings(method="tomoe").calibration.tokens == 131072
    few = {"method": "tomoe", "calibration": {"tokens": 2048, "window": 256}}
    for refused in (lambda: plan(tiny("llama"), **few), lambda: moesaic.convert(tiny("llama"), tmp_path / "x", **few)):
        with pytest.raises(InputError, match="8 calibration windows, of which 8 are held out"):
            refused()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_plans(name: str, wide: Path) -> None:
    values = recipe(name)
    assert settings(**values).method == values["method"]
    assert 0 < plan(wide, **values).active_ffn_fraction <= 1
    assert len(summary(name)) > 20
