"""Speed against perplexity, both over the dense model of the engine, with the Pareto front drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.payoff.measured import Found, Regime, complete, front
from benchmarks.payoff.points import GROUPS

from moesaic.errors import InputError

_STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#222222", "marker": "s"},
    "pruned": {"color": "#b8860b", "marker": "v"},
    "stock": {"color": "#c0392b", "marker": "o"},
    "own": {"color": "#1f6fb2", "marker": "D"},
}
_TICKS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0, 3.0, 5.0)


def draw(panels: Mapping[str, Sequence[Found]], regime: Regime, out: Path) -> Path:
    """Write the image ``out``, a panel per name. Raises InputError when matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing needs matplotlib", "pip install 'moesaic[report]'") from error
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.8 * columns, 5.2 * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, entries) in zip(axes, panels.items(), strict=False):
        _panel(axis, name, entries, regime)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    named: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f"{regime.label}: right and low is good")
    figure.savefig(out, dpi=110, metadata={"Software": None})
    return out


def _panel(axis: Any, name: str, entries: Sequence[Found], regime: Regime) -> None:
    known = complete(entries, regime)
    for group, label in GROUPS.items():
        own = [one for one in known if one.point.group == group]
        if own:
            axis.errorbar(
                *_bars(own, regime), linestyle="none", elinewidth=0.8, capsize=2, label=label, **_STYLES[group]
            )
    best = front(entries, regime)
    ratios = [one.over_dense.ratio for one in best if one.over_dense is not None]
    axis.plot([one.paces[regime].ratio for one in best], ratios, color="#2e8b57", linewidth=1.2, label="Pareto front")
    for one in known:
        assert one.over_dense is not None
        place = (one.paces[regime].ratio, one.over_dense.ratio)
        axis.annotate(one.point.key, place, fontsize=6.5, xytext=(4, 3), textcoords="offset points")
    axis.axhline(1, color="black", linewidth=0.6)
    axis.axvline(1, color="black", linewidth=0.6)
    axis.set_yscale("log")
    top = max([*ratios, *(one.over_dense.ratio for one in known if one.over_dense is not None), 1.1])
    ticks = [tick for tick in _TICKS if tick <= top * 1.05]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("tokens per second over dense")
    axis.set_ylabel("perplexity over dense")


def _bars(entries: Sequence[Found], regime: Regime) -> tuple[list[float], list[float], Any, Any]:
    """x, y, and how far their intervals reach below and above: y and x, as errorbar takes them."""
    paces = [one.paces[regime] for one in entries]
    ratios = [one.over_dense for one in entries if one.over_dense is not None]
    ys = [ratio.ratio for ratio in ratios]
    y_bars = [
        [ratio.ratio - (ratio.ratio if ratio.low is None else ratio.low) for ratio in ratios],
        [(ratio.ratio if ratio.high is None else ratio.high) - ratio.ratio for ratio in ratios],
    ]
    x_bars = [[pace.ratio - pace.low for pace in paces], [pace.high - pace.ratio for pace in paces]]
    return [pace.ratio for pace in paces], ys, y_bars, x_bars
