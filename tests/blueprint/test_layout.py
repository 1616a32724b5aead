"""The SxAyEz notation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.blueprint.layout import Layout
from moesaic.errors import InputError


@pytest.mark.parametrize(
    ("text", "routed", "fraction"),
    [("S3A3E8", 5, 0.75), ("s2a2e16", 14, 0.25), ("S0A1E4", 4, 0.25), ("S4A0E4", 0, 1.0)],
)
def test_parse_reads_the_notation(text: str, routed: int, fraction: float) -> None:
    layout = Layout.parse(text)
    assert (layout.routed, layout.active_fraction, str(layout)) == (routed, fraction, text.upper())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3/8", "cannot read layout"),
        ("S3A6E8", "top-k 6 is larger than its 5 routed"),
        ("S9A0E8", "more shared units than units"),
        ("S0A0E8", "nothing active"),
        ("S3A0E8", "never uses its routed experts"),
        ("S0A0E0", "negative or zero"),
    ],
)
def test_impossible_layouts_say_why(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Layout.parse(text)


@given(st.integers(1, 64), st.integers(1, 5000))
@settings(max_examples=60, deadline=None)
def test_unit_sizes_cover_the_ffn_and_differ_by_at_most_one(units: int, d_ff: int) -> None:
    layout = Layout(0, units, units)
    if d_ff < units:
        with pytest.raises(InputError, match="only"):
            layout.unit_sizes(d_ff)
        return
    sizes = layout.unit_sizes(d_ff)
    assert sum(sizes) == d_ff
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.75, "S3A3E8"), (0.5, "S2A2E8"), (1.0, "S4A4E8"), (0.125, "S0A1E8")]
)
def test_active_fraction_picks_a_layout_of_that_size(fraction: float, expected: str) -> None:
    layout = Layout.from_active_fraction(fraction)
    assert str(layout) == expected
    assert layout.active_fraction == fraction


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5])
def test_active_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="active fraction"):
        Layout.from_active_fraction(fraction)
