"""Jobs on a device that is not the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.children import run_tests


@pytest.mark.timeout(600)
def test_layers_and_solvers_are_where_the_device_is() -> None:
    run_tests(Path(__file__).with_name("devices_elsewhere.py"))
