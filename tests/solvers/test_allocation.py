"""The budget over layers, on curves given by hand: totals, optima against exhaustive search, what cannot be."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import InputError
from moesaic.solvers.allocation import GRID, Curve, allocate, loss

FLAT = Curve(0.1, 1.5)
STEEP = Curve(5.0, 1.5)
CURVES = st.lists(st.builds(Curve, st.floats(0.01, 10), st.floats(1, 4)), min_size=2, max_size=6)


def test_a_curve_goes_through_two_measured_losses_and_the_dense_model() -> None:
    curve = Curve.fit({0.75: 0.02, 0.5: 0.11})
    assert curve(0.75) == pytest.approx(0.02)
    assert curve(0.5) == pytest.approx(0.11)
    assert curve(1.0) == 0.0


def test_noisy_losses_still_give_a_curve_that_falls_with_the_neurons() -> None:
    for losses in ({0.75: 0.03, 0.5: 0.02}, {0.75: 0.0, 0.5: 0.0}, {0.75: -1e-6, 0.5: 0.01}, {0.6: 0.1}):
        curve = Curve.fit(losses)
        assert curve(0.3) > curve(0.6) > curve(0.9) > 0


def test_leading_takes_the_first_layers_and_any_takes_the_worst() -> None:
    curves = [STEEP, STEEP, FLAT, FLAT, FLAT, FLAT, FLAT, STEEP]
    leading, free = (allocate(curves, 64, 48, mode) for mode in ("leading", "any"))
    assert leading == (64, 64, *[(48 * 8 - 128) // 6] * 6)
    assert free == (64, 64, *[(48 * 8 - 192) // 5] * 5, 64)
    assert loss(curves, free, 64) < loss(curves, leading, 64) < loss(curves, [48] * 8, 64)


def test_equal_layers_stay_equal_in_every_mode() -> None:
    modes: tuple[Literal["leading", "any", "widths"], ...] = ("leading", "any", "widths")
    for mode in modes:
        assert allocate([FLAT] * 5, 64, 48, mode) == (48,) * 5


@settings(max_examples=30, deadline=None)
@given(CURVES, st.integers(9, 63))
def test_totals_are_kept_to_the_grain_and_freedom_never_costs(curves: list[Curve], active: int) -> None:
    d_ff, layers = 64, len(curves)
    leading, free, widths = (allocate(curves, d_ff, active, mode) for mode in ("leading", "any", "widths"))
    for neurons, grain in ((leading, layers), (free, layers), (widths, d_ff // GRID)):
        assert 0 <= active * layers - sum(neurons) < grain
    uniform = loss(curves, [active] * layers, d_ff)
    assert loss(curves, free, d_ff) <= loss(curves, leading, d_ff) <= uniform


@settings(max_examples=10, deadline=None)
@given(st.lists(st.builds(Curve, st.floats(0.01, 10), st.floats(1, 4)), min_size=3, max_size=3), st.integers(2, 15))
def test_widths_are_the_best_of_all_choices(curves: list[Curve], active: int) -> None:
    d_ff = 16
    found = allocate(curves, d_ff, active, "widths")
    choices = itertools.product(range(1, d_ff + 1), repeat=3)
    best = min(loss(curves, choice, d_ff) for choice in choices if sum(choice) <= 3 * active)
    assert loss(curves, found, d_ff) == pytest.approx(best, rel=1e-9)


def test_only_sizes_that_the_method_makes_are_taken() -> None:
    curves = [STEEP, FLAT, FLAT, FLAT]
    assert set(allocate(curves, 64, 40, "widths", lambda count: count % 8 == 0)) <= {*range(8, 64, 8), 64}
    assert allocate(curves, 64, 40, "leading", lambda count: count == 40) == (40,) * 4
    with pytest.raises(InputError, match="no way to share out 40 of 64"):
        allocate(curves, 64, 40, "any", lambda _: False)
    with pytest.raises(InputError, match="no way to share out 40 of 64"):
        allocate(curves, 64, 40, "widths", lambda _: False)
