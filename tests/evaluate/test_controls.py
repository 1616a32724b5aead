"""The controls have the active size of the model that they stand beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.blueprint import Blueprint
from moesaic.calibration.config import CalibrationConfig
from moesaic.evaluate.controls import active_fraction, control_job
from moesaic.jobs.decide import decide
from moesaic.jobs.job import prepare
from moesaic.settings import ConvertSettings

CALIBRATION = {"tokens": 256, "window": 64}


def made_by(dense: Path, method: str, **settings: Any) -> Blueprint:
    return decide(
        prepare(dense, ConvertSettings.model_validate({"method": method, "calibration": CALIBRATION} | settings))
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
