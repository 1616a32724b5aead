"""Perplexity over dense, and task accuracy less dense where it was measured, against the neurons that are used.

Bars are 95 % intervals, paired with the dense model; markers grow with storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.cases import RECIPES
from benchmarks.compare.measure import TEXTS

from moesaic.errors import InputError

_DENSE_MARKER = 30.0
"""Area of the marker of a model as large as the dense one, in square points."""
_TICKS = (1.0, 1.1, 1.2, 1.4, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
"""Of perplexity over dense. Above the last nothing is drawn, so that the others can be told apart."""
_FOREMOST = "union-lead"
"""The case with the thick line: our method as it is by default."""


def draw(rows: Sequence[dict[str, Any]], title: str, out: Path) -> Path:
    """Write the image ``out``; ``rows`` as :func:`benchmarks.compare.table.comparisons` orders them, dense first.

    Raises InputError when matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing needs matplotlib", "pip install 'moesaic[report]'") from error
    names = [name for name in RECIPES if any(row["case"] == name for row in rows[1:])]
    panels = [*TEXTS, *(["tasks"] if "accuracy" in rows[0] else [])]
    figure = Figure(figsize=(5.5 * len(panels), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _panel(axis, panel, rows[0], [[row for row in rows if row["case"] == name] for name in names])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.suptitle(
        f"{title}; the area of a marker is the number of parameters; above {_TICKS[-1]:g} times dense nothing is drawn"
    )
    figure.savefig(out, dpi=120, metadata={"Software": None})
    return out


def _panel(axis: Any, panel: str, dense: dict[str, Any], series: Sequence[Sequence[dict[str, Any]]]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    axis.axhline(0 if panel == "tasks" else 1, color="black", linewidth=1, label="dense")
    for number, unordered in enumerate(series):
        label, first = unordered[0]["label"], unordered[0]["case"] == _FOREMOST
        measured = [row for row in unordered if panel != "tasks" or "accuracy" in row]
        rows = sorted(measured, key=lambda row: _used(row, panel))
        xs, found = [100 * _used(row, panel) for row in rows], [_interval(row, panel) for row in rows]
        ys = [value for value, _, _ in found]
        bars = [[value - low for value, low, _ in found], [high - value for value, _, high in found]]
        style = {"color": "black" if first else colours[number % len(colours)], "zorder": 3 if first else 2}
        line = {"linewidth": 2.5 if first else 1, "linestyle": "--" if "control" in label else "-", "label": label}
        axis.errorbar(xs, ys, yerr=bars, elinewidth=1, capsize=2, **line, **style)
        growth = [row["size"]["parameters"] / dense["size"]["parameters"] for row in rows]
        axis.scatter(xs, ys, s=[_DENSE_MARKER * g for g in growth], **style)
    axis.set_xlim(0, 100)
    axis.set_xlabel("FFN neurons that a token uses, %")
    axis.set_ylabel("mean task accuracy less dense, points" if panel == "tasks" else f"perplexity over dense, {panel}")
    axis.grid(alpha=0.3)
    if panel != "tasks":
        axis.set_yscale("log")
        axis.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axis.minorticks_off()
        axis.set_ylim(0.97, _TICKS[-1])


def _used(row: dict[str, Any], panel: str) -> float:
    """Share of the neurons that the panel's text used; as planned where that was not counted."""
    return row.get("active_on", {}).get(panel, row["size"]["active_ffn"])


def _interval(row: dict[str, Any], panel: str) -> tuple[float, float, float]:
    """What is drawn of a row, and the ends of its interval."""
    if panel == "tasks":
        points = row["accuracy"]["to_dense"]
        return 100 * points["difference"], 100 * points["low"], 100 * points["high"]
    ratio = row["ratio_to_dense"][panel]
    return ratio["ratio"], ratio["low"], ratio["high"]
