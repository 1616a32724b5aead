"""Charts: round ticks that span the values, marks where the values are."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, heat_map, nice_ticks


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_span_the_values_and_are_few(low: float, span: float, count: int) -> None:
    high = low + span
    ticks = nice_ticks(low, high, count)
    if high <= low:
        return
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0
    assert ticks[0] <= low + 1e-6 * abs(low) + 1e-9 * step
    assert ticks[-1] >= high - 1e-6 * abs(high) - 1e-9 * step
    assert len(ticks) <= count + 3


def test_marks_stand_where_the_values_are() -> None:
    chart = Chart("a chart", (0, 10), (0, 1))
    chart.line([(0, 0), (10, 1)], "main")
    made = chart.svg()
    places = re.findall(r'<circle class="dot main" cx="([\d.]+)" cy="([\d.]+)"', made)
    assert [tuple(map(float, place)) for place in places] == [
        (LEFT, HEIGHT - BOTTOM),
        (WIDTH - RIGHT, TOP),
    ]
    assert "layer 10: 1" in made


def test_a_chart_of_one_value_has_a_mark() -> None:
    chart = Chart("one", (3, 3), (0.5, 0.5))
    chart.line([(3, 0.5)], "main", dots=False)
    assert chart.svg().count("<circle") == 1


def test_the_heat_map_outlines_what_nothing_chose() -> None:
    made = heat_map([("3", [0.75, 0.25, 0.0])], [1 / 3], "loads")
    assert made.count('class="cell"') == 2
    assert made.count('class="dead"') == 1
    strengths = [float(found) for found in re.findall(r'fill-opacity="([\d.]+)"', made)]
    assert strengths[0] == pytest.approx(0.06 + 0.94 * 0.75, abs=1e-3)
