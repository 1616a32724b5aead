from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.solvers.fade import Schedule, fade_fractions


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(["linear", "power", "dyadic"]),
    branches=st.integers(1, 300),
    low=st.floats(0, 0.5),
    rise=st.floats(0, 0.49),
    gamma=st.floats(0.2, 5),
)
def test_schedules_rise_from_s_min_to_s_max(
    schedule: Schedule, branches: int, low: float, rise: float, gamma: float
) -> None:
    fractions = fade_fractions(schedule, branches, low, low + rise, gamma)
    assert len(fractions) == branches
    assert fractions[0] == low
    assert all(a <= b for a, b in pairwise(fractions))
    if branches > 1:
        assert fractions[-1] == pytest.approx(low + rise, abs=1e-15)


def test_linear_removes_half_of_s_max_on_average() -> None:
    assert sum(fade_fractions("linear", 32, 0.0, 0.4)) / 32 == pytest.approx(0.2)


def test_power_is_the_power_of_the_linear_rise() -> None:
    assert fade_fractions("power", 3, 0.0, 1.0, gamma=3.0) == pytest.approx((0.0, 0.125, 1.0))


def test_dyadic_groups_double_and_close_half_of_the_remaining_distance() -> None:
    fractions = fade_fractions("dyadic", 9, 0.0, 0.7)
    steps = [0.0, 0.4, 0.4, 0.6, 0.6, 0.6, 0.6, 0.7, 0.7]  # 0.8 (1 - 2^-j): J = 3, so 0.7 / (1 - 1/8) = 0.8
    assert fractions == pytest.approx(steps)
