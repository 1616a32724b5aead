"""The key of a conversion: what the output depends on, so that an unfinished folder of another run is not resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.jobs.job import prepare
from moesaic.jobs.request import check_request
from moesaic.jobs.settings import ConvertSettings

CALIBRATION = {"tokens": 64, "window": 32, "compute_dtype": "float32"}
BASE = {"method": "cmoe", "options": {"layout": "S1A1E4"}, "calibration": CALIBRATION}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"calibration": CALIBRATION | {"seed": 1}},
        {"calibration": CALIBRATION | {"tokens": 96}},
        {"calibration": CALIBRATION | {"compute_dtype": "bfloat16"}},
        {"options": {"layout": "S1A2E4"}},
        {"dense_layers": [0]},
        {"router": "oracle"},
        {"target": "moesaic"},
        {"target_options": {"align": 16}},
        {"method": "static"},
    ],
    ids=str,
)
def test_all_that_the_output_depends_on_is_in_the_key(change: dict[str, Any], tiny: Callable[[str], Path]) -> None:
    keys = [
        prepare(check_request(tiny("llama"), ConvertSettings.model_validate(BASE | one))).key for one in ({}, change)
    ]
    assert keys[0] != keys[1]
