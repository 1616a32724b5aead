"""Perplexity over dense against the bytes that one token reads in the FFNs: all rows, with their 95 % intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.map.points import Point, Setting

from moesaic.errors import InputError

_TICKS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0)
"""Of perplexity over dense. Above the last nothing is drawn, so that the others can be told apart."""
_STYLES = {
    "bound": {"color": "grey", "linestyle": ":", "marker": "x"},
    "weights": {"color": "black", "linestyle": "none", "marker": "s"},
    "grid": {"color": "lightgrey", "linestyle": "none", "marker": "s"},
    "activations": {"linestyle": "--", "marker": "^"},
    "ours": {"linestyle": "-", "marker": "o"},
    "variant": {"linestyle": "-", "marker": ".", "linewidth": 0.8},
    "published": {"linestyle": "-.", "marker": "v"},
}


def draw(points: Sequence[Point], title: str, out: Path) -> Path:
    """Write the image ``out``, a panel for each of the two texts with most rows. Raises InputError: no matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing needs matplotlib", "pip install 'moesaic[report]'") from error
    shown = [point for point in points if point.group != "dense"]
    panels = [setting for setting, _ in Counter(point.setting for point in shown).most_common(2)]
    shown = [point for point in shown if point.setting in panels]
    series = list(dict.fromkeys((point.group, point.series) for point in shown))
    palette = [*colormaps["tab10"].colors, *colormaps["Set2"].colors]  # pyright: ignore[reportAttributeAccessIssue]
    colours = {name: palette[number % len(palette)] for number, (_, name) in enumerate(series)}
    figure = Figure(figsize=(6.5 * max(1, len(panels)), 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=False):
        _panel(axis, panel, [[p for p in shown if (p.group, p.series) == name] for name in series], colours)
    named: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(named.values()), list(named), loc="outside lower center", ncols=2 * len(axes), fontsize=8, frameon=False
    )
    figure.suptitle(f"{title}: left and low is good; above {_TICKS[-1]:g} times dense nothing is drawn")
    figure.savefig(out, dpi=110, metadata={"Software": None})
    return out


def _panel(axis: Any, panel: Setting, series: Sequence[Sequence[Point]], colours: dict[str, Any]) -> None:
    axis.axhline(1, color="black", linewidth=1)
    for unordered in series:
        points = sorted((p for p in unordered if p.setting == panel), key=lambda point: point.cost.bytes)
        if not points:
            continue
        style: dict[str, Any] = {
            "color": colours[points[0].series],
            "linewidth": 1.4,
            "markersize": 5,
            **_STYLES[points[0].group],
        }
        ratios = [point.ratio for point in points]
        ys = [ratio.ratio for ratio in ratios]
        bars = [
            [ratio.ratio - (ratio.ratio if ratio.low is None else ratio.low) for ratio in ratios],
            [(ratio.ratio if ratio.high is None else ratio.high) - ratio.ratio for ratio in ratios],
        ]
        single = "@" not in points[0].row
        label = points[0].label.rpartition(",")[0]
        if single:
            own = ", the dense model's own grid" if points[0].group == "grid" else ""
            label = f"weight-only quantisation{own}"
        axis.errorbar([p.cost.bytes for p in points], ys, yerr=bars, elinewidth=0.7, capsize=2, label=label, **style)
        if single:
            axis.annotate(
                points[0].row, (points[0].cost.bytes, ys[0]), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
    axis.set_xlim(0.1, 1.05)
    axis.set_yscale("log")
    axis.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axis.minorticks_off()
    axis.set_ylim(0.98, _TICKS[-1])
    axis.grid(alpha=0.3)
    axis.set_xlabel("bytes that one token reads in the FFNs, over those of the dense FFNs in bf16")
    axis.set_ylabel(f"perplexity over dense, {panel.text}")
