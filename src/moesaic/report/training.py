"""Training curves of an output that was trained: loss and held-out loss, and the figures that were logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.report.facts import Facts
from moesaic.report.layers import figure
from moesaic.report.svg import Chart, Point, nice_ticks

_MOST_POINTS = 300
_LEFT_OUT = ("step", "seconds", "learning_rate", "rate", "held_out")
_SMOOTH = 0.05
"""Share of the run over which the smoothed curve averages."""


def training(facts: Facts) -> list[str]:
    """One chart per logged figure, the loss first; nothing where nothing was trained."""
    lines = facts.training
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name not in _LEFT_OUT]
    names += [name for line in lines for name in line.get("held_out", {}) if name not in names]
    charts = [_curve(lines, name) for name in dict.fromkeys(names)]
    grid = "".join(chart for chart in charts if chart)
    return [f'<div class="charts">{grid}</div>'] if grid else []


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> str:
    trained = [(float(line["step"]), line[name]) for line in lines if _number(line.get(name))]
    held = [
        (float(line["step"]), line["held_out"][name]) for line in lines if _number(line.get("held_out", {}).get(name))
    ]
    if len(trained) + len(held) < 2:
        return ""
    values = [value for _, value in trained + held]
    ends = nice_ticks(min(values), max(values))
    last = max(step for step, _ in trained + held)
    low, high = (ends[0], ends[-1]) if len(ends) > 1 else (values[0] - 1, values[0] + 1)
    chart = Chart(name, (0, last), (low, high), "{:.4g}".format, "step")
    chart.line(_thinned(trained), "muted", dots=False)
    chart.line(_thinned(_smoothed(trained)), "main", dots=False)
    chart.line(held, "second", name="held out")
    keys = [("trained", "muted"), ("smoothed", "main")] if trained else []
    keys += [("held out", "second")] if held else []
    legend = "".join(f'<span class="key {style}">{text}</span>' for text, style in keys)
    return figure(name.replace("_", " "), chart.svg(), f'<div class="legend">{legend}</div>')


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _smoothed(points: Sequence[Point]) -> list[Point]:
    width = max(1, round(_SMOOTH * len(points)))
    smooth = []
    for place, (step, _) in enumerate(points):
        window = [value for _, value in points[max(0, place - width + 1) : place + 1]]
        smooth.append((step, sum(window) / len(window)))
    return smooth


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    return points[:: max(1, len(points) // _MOST_POINTS)]
