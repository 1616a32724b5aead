"""Curves of a training run, drawn from its train.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.errors import InputError
from moesaic.train.loop import LOG_NAME, read_log

_SMOOTH = 0.05
"""Share of the run over which the smoothed curve averages."""


def plot_curves(folder: Path, out: Path, figures: Sequence[str] = ()) -> Path:
    """Draw the training and held-out loss, and one panel for each of ``figures``, into the image ``out``.

    Args:
        folder: Folder of the run, with its train.jsonl.
        out: Image to write; its suffix says the format.
        figures: Names of logged figures.

    Raises:
        InputError: matplotlib is missing or the run has logged nothing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing curves needs matplotlib", "pip install 'moesaic[report]'") from error
    lines = read_log(folder)
    if not lines:
        raise InputError(f"{folder / LOG_NAME} has no lines", "train first")
    figure = Figure(figsize=(8, 3.2 * (1 + len(figures))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(figures), 1, squeeze=False)[:, 0]
    for axis, name in zip(axes, ("loss", *figures), strict=True):
        _draw(axis, lines, name)
    axes[-1].set_xlabel("step")
    figure.savefig(out, dpi=120)
    return out


def _draw(axis: Any, lines: list[dict[str, Any]], name: str) -> None:
    trained = [(line["step"], line[name]) for line in lines if name in line]
    if trained:
        steps, values = zip(*trained, strict=True)
        axis.plot(steps, values, color="#9db8d2", linewidth=0.8)
        width = max(1, round(_SMOOTH * len(values)))
        recent = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
        smooth = [sum(window) / len(window) for window in recent]
        axis.plot(steps, smooth, color="#1f5a92", linewidth=1.6, label=name)
    held_out = [(line["step"], line["held_out"][name]) for line in lines if name in line.get("held_out", {})]
    if held_out:
        axis.plot(*zip(*held_out, strict=True), color="#c2452d", marker="o", markersize=3, label=f"{name}, held out")
    axis.set_ylabel(name)
    axis.grid(alpha=0.3)
    if trained or held_out:
        axis.legend(frameon=False)
