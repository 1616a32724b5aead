"""Perplexity, and task accuracy where it was measured, against the active fraction; markers grow with storage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.measure import TEXTS

from moesaic.errors import InputError

_DENSE_MARKER = 30.0
"""Area of the marker of a model as large as the dense one, in square points."""
_WORST = 6.0
"""Perplexities above so many times that of the dense model are off the plot, so that the others can be told apart."""


def draw(rows: Sequence[dict[str, Any]], title: str, out: Path) -> Path:
    """Write the image ``out``; ``rows`` as :func:`benchmarks.compare.table.comparisons` orders them, dense first.

    Raises InputError when matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing needs matplotlib", "pip install 'moesaic[report]'") from error
    dense, names = rows[0], sorted({row["case"] for row in rows[1:]})
    panels = [*TEXTS, *(["tasks"] if "accuracy" in dense else [])]
    figure = Figure(figsize=(5.5 * len(panels), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _panel(axis, panel, dense, [[row for row in rows if row["case"] == name] for name in names])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.suptitle(
        f"{title}; the area of a marker is the number of parameters; above {_WORST:g} times dense nothing is drawn"
    )
    figure.savefig(out, dpi=120, metadata={"Software": None})
    return out


def _panel(axis: Any, panel: str, dense: dict[str, Any], series: Sequence[Sequence[dict[str, Any]]]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    axis.axhline(_height(dense, panel), color="black", linewidth=1, label="dense")
    for number, unordered in enumerate(series):
        label = unordered[0]["label"]
        measured = [row for row in unordered if panel != "tasks" or "accuracy" in row]
        rows = sorted(measured, key=lambda row: _used(row, panel))
        xs = [100 * _used(row, panel) for row in rows]
        ys = [_height(row, panel) for row in rows]
        growth = [row["size"]["parameters"] / dense["size"]["parameters"] for row in rows]
        style = {"color": colours[number % len(colours)], "linestyle": "--" if "control" in label else "-"}
        axis.plot(xs, ys, linewidth=1, label=label, **style)
        axis.scatter(xs, ys, s=[_DENSE_MARKER * g for g in growth], color=style["color"])
    axis.set_xlim(0, 100)
    axis.set_xlabel("FFN neurons that a token uses, %")
    axis.set_ylabel("mean task accuracy, %" if panel == "tasks" else f"perplexity, {panel}")
    axis.grid(alpha=0.3, which="both")
    if panel != "tasks":
        dense_height = _height(dense, panel)
        heights = [_height(row, panel) for rows in series for row in rows]
        axis.set_yscale("log")
        axis.set_ylim(0.9 * dense_height, 1.1 * min(_WORST * dense_height, max(heights, default=dense_height)))


def _used(row: dict[str, Any], panel: str) -> float:
    """Share of the neurons that the panel's text used; as planned where that was not counted."""
    return row.get("active_on", {}).get(panel, row["size"]["active_ffn"])


def _height(row: dict[str, Any], panel: str) -> float:
    if panel == "tasks":
        return 100 * row["accuracy"]["mean"]
    return row["perplexity"][panel]["value"]
