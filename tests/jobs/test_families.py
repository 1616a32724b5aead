"""Families that bring nothing new to what is computed: one conversion each, from end to end.

Methods and dtypes take turns, so that every family has one of each in some order and the suite stays short. What is
computed, read and written is tested with the other families (``tiny_models.FAMILIES``), each by each method.
``python -m benchmarks.exactness`` does all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.exactness import DTYPES, METHODS, exactness

from tests.tiny_models import MORE_FAMILIES, MORE_MOE

CASES = [(family, list(METHODS)[turn % 3], DTYPES[turn % 2]) for turn, family in enumerate([*MORE_FAMILIES, *MORE_MOE])]


@pytest.mark.parametrize(("family", "method", "dtype"), CASES)
def test_a_family_is_converted_runs_and_comes_back(family: str, method: str, dtype: str, tmp_path: Path) -> None:
    found = exactness(family, method, dtype, tmp_path)
    assert found.partition
    assert found.logits <= 1e-5
    assert found.oracle <= 1e-5
    assert found.cached
    assert found.restored
