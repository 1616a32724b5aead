"""The runtime on a device that is not the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.children import run_tests


@pytest.mark.timeout(600)
def test_everything_is_made_where_the_tokens_are() -> None:
    run_tests(Path(__file__).with_name("devices_elsewhere.py"))
