"""The demonstration's picture: perplexity over dense against the speed of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.errors import InputError

if TYPE_CHECKING:
    from moesaic.jobs.demo import Row

_GAP = (6, 5)
"""Points between a mark and its name."""


def plot_rows(rows: Sequence[Row], protocol: str, out: Path) -> Path:
    """Draw one mark per model into the SVG ``out``; lower and further right is better.

    Raises InputError when matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing needs matplotlib", "pip install 'moesaic[report]'") from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    for row in rows:
        axis.plot(row.faster, row.ratio, "o", color="#555555" if row.model == "dense" else "#1f6f8b")
        axis.annotate(f"{row.model}", (row.faster, row.ratio), textcoords="offset points", xytext=_GAP, fontsize=8)
    axis.set_yscale("log")
    axis.set_yticks(ticks := [tick for tick in (1, 1.2, 1.5, 2, 3, 5, 8) if tick <= 1.1 * max(r.ratio for r in rows)])
    axis.set_yticks([], minor=True)
    axis.set_yticklabels([f"{tick:g}" for tick in ticks])
    axis.set_xlabel("decoding speed over dense")
    axis.set_ylabel("perplexity over dense")
    axis.set_title(protocol, fontsize=9)
    axis.margins(x=0.25, y=0.15)
    axis.grid(alpha=0.3)
    figure.savefig(out)
    return out
