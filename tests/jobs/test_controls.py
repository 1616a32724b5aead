"""The controls have the active size of the model that they stand beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.blueprint.model import Blueprint
from moesaic.calibration.config import CalibrationConfig
from moesaic.evaluate.activity import Activity
from moesaic.jobs.controls import active_fraction, control_job, control_model
from moesaic.jobs.decide import decide
from moesaic.jobs.job import prepare
from moesaic.jobs.request import check_request
from moesaic.jobs.settings import ConvertSettings
from moesaic.progress import Silent

CALIBRATION = {"tokens": 256, "window": 64}


def made_by(dense: Path, method: str, **settings: Any) -> Blueprint:
    return decide(
        prepare(
            check_request(
                dense, ConvertSettings.model_validate({"method": method, "calibration": CALIBRATION} | settings)
            )
        )
    )


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("cmoe", {"options": {"layout": "S1A1E8"}}),
        ("token_clusters", {"options": {"active": 0.5, "experts": 4}}),
        ("static", {"options": {"active": 0.5}}),
        ("random", {"options": {"active": 0.5}}),
        (
            "static",
            {"options": {"layout": "S2A2E8"}, "allocation": {"mode": "widths", "tokens": 128}, "target": "moesaic"},
        ),
        ("static", {"options": {"active": 0.5}, "dense_layers": [0]}),
    ],
)
@pytest.mark.parametrize(("control", "step"), [("static", 1 / 37), ("random", 1 / 10)])
def test_a_control_has_the_active_fraction_of_the_model(
    method: str, settings: dict[str, Any], control: str, step: float, tiny: Callable[[str], Path]
) -> None:
    model = made_by(tiny("llama"), method, **settings)
    beside = decide(control_job(control, tiny("llama"), model, CalibrationConfig.model_validate(CALIBRATION)))
    assert active_fraction(beside) == pytest.approx(active_fraction(model), abs=step)
    assert set(beside.sites) == set(model.sites)


def test_beside_free_widths_a_control_uses_what_the_text_used(tiny: Callable[[str], Path]) -> None:
    model = made_by(tiny("llama"), "token_clusters", options={"active": 0.5, "experts": 4, "split": "union"})
    used = Activity(dict.fromkeys(model.sites, 30 * 10.0), dict.fromkeys(model.sites, 10))
    config = CalibrationConfig.model_validate(CALIBRATION)
    beside = decide(control_job("static", tiny("llama"), model, config, used))
    assert active_fraction(beside) == pytest.approx(30 / 37, abs=1 / 37)
    planned = decide(control_job("static", tiny("llama"), model, config))
    assert active_fraction(planned) == pytest.approx(active_fraction(model), abs=1 / 37)
    everything = Activity(dict.fromkeys(model.sites, 370.1), dict.fromkeys(model.sites, 10))
    assert control_job("static", tiny("llama"), model, config, everything).config.active == 1  # type: ignore[attr-defined]


def test_the_layout_of_experts_of_a_given_width_is_not_their_active_fraction(tiny: Callable[[str], Path]) -> None:
    model = made_by(tiny("llama"), "moefication", options={"layout": "S0A6E8", "expert_width": 17})
    beside = decide(control_job("static", tiny("llama"), model, CalibrationConfig.model_validate(CALIBRATION)))
    assert active_fraction(model) < 0.72
    assert active_fraction(beside) == pytest.approx(active_fraction(model), abs=1 / 37)


def test_a_control_that_splits_fewer_experts_of_a_moe_still_runs(tiny: Callable[[str], Path]) -> None:
    calibration = {"tokens": 96, "window": 32}
    options = {"active": 0.5, "experts": 3, "max_params": None}
    dense = tiny("mixtral")
    model = made_by(dense, "token_clusters", options=options, hierarchical=True, calibration=calibration)
    beside = decide(control_job("static", dense, model, CalibrationConfig.model_validate(calibration)))
    assert set(beside.sites) < set(model.sites)  # the control asks for more text per expert
    config = CalibrationConfig.model_validate(calibration)
    control, active = control_model(control_job("static", dense, model, config), dense, model, Silent())
    whole = [path for path, plan in model.sites.items() if not plan.experts and plan.keeps_all]
    kept = sum(plan.active_neurons for path, plan in beside.sites.items() if path not in whole)
    rest = sum(plan.d_ff for path, plan in model.sites.items() if path in whole or path not in beside.sites)
    assert active == pytest.approx((kept + rest) / sum(plan.d_ff for plan in model.sites.values()))
    with torch.inference_mode():
        assert torch.isfinite(control(input_ids=torch.arange(20)[None]).logits).all()
