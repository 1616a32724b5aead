"""The sweep's figures as SVG text: real against Gaussian twin, routers, equal cost, learning curves, dictionary."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from moesaic.distill.analyse import dense_curve
from moesaic.errors import InputError

_TITLES = {"real": "real inputs", "gaussian": "Gaussian twin"}
_COLOURS = ("#1f5a92", "#c2452d", "#3b8f5a", "#8a5aa8", "#b8860b", "#4a4a4a")
_STYLES = ("-", "--", ":", "-.")


def figures(results: dict[str, Any]) -> dict[str, str]:
    """Title -> SVG of every figure for which there are results.

    Raises InputError when matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError("drawing needs matplotlib", "pip install 'moesaic[report]'") from error
    made = {
        "Variance unexplained against active neurons": _students(results, "active"),
        "Variance unexplained against multiply-accumulates per token, router included": _students(results, "macs"),
        "Learning curves of the largest mixture": _curves(results),
    }
    if results["probe"]:
        made["Sparsity of the inputs in a learned dictionary"] = _probe(results)
    return made


def _panels(laws: Sequence[str]) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(laws), 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, len(laws), squeeze=False)[0]
    for axis, law in zip(axes, laws, strict=True):
        axis.set_title(_TITLES[law])
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("fraction of variance unexplained (test)")
    return figure, list(axes)


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "moesaic", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _families(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["active"]):
        if row["spec"]["experts"]:
            found.setdefault(row["family"], []).append(row)
    return found


def _students(results: dict[str, Any], key: str) -> str:
    rows = results["students"]
    laws = [law for law in _TITLES if any(row["law"] == law for row in rows)]
    figure, axes = _panels(laws)
    for axis, law in zip(axes, laws, strict=True):
        mine = [row for row in rows if row["law"] == law]
        unit = 1 if key == "active" else 2 * results["d_model"]
        axis.plot(*_columns([(w * unit, f) for w, f in dense_curve(mine)]), color="black", marker="s", label="dense")
        for place, (name, family) in enumerate(_families(mine).items()):
            style = {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _STYLES[place // len(_COLOURS) % 4]}
            axis.plot(*_columns([(row[key], row["fvu"]) for row in family]), marker="o", label=name, **style)
        if key == "active" and (floor := results["baselines"].get(law, {}).get("pca_floor")):
            points = [(int(width), fvu) for width, fvu in floor.items() if fvu > 1e-6]
            axis.plot(*_columns(points), color="#999999", linewidth=1, label="PCA floor")
        axis.set_xlabel("active neurons" if key == "active" else "multiply-accumulates per token")
    axes[-1].legend(frameon=False, fontsize=8)
    return _svg(figure)


def _columns(points: Iterable[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    xs, ys = zip(*points, strict=True) if (points := list(points)) else ((), ())
    return xs, ys


def _curves(results: dict[str, Any]) -> str:
    """Validation FVU by epoch and rate, for the largest MoE student of every law."""
    rows = results["students"]
    laws = [law for law in _TITLES if any(row["law"] == law for row in rows)]
    figure, axes = _panels(laws)
    for axis, law in zip(axes, laws, strict=True):
        axis.set_xscale("linear")
        axis.set_xlabel("epoch")
        routed = [row for row in rows if row["law"] == law and row["spec"]["experts"]]
        if not routed:
            continue
        largest = max(routed, key=lambda row: (row["parameters"], row["active"]))
        axis.set_title(f"{_TITLES[law]}: {largest['family']}, A={largest['active']}")
        trials = [trial for trial in results["trials"] if trial["law"] == law and trial["spec"] == largest["spec"]]
        for trial, colour in zip(sorted(trials, key=lambda t: t["rate"]), _COLOURS * len(trials), strict=False):
            points = [(epoch, fvu) for epoch, _, fvu in trial["curve"] if epoch]
            axis.plot(*_columns(points), color=colour, marker=".", label=f"rate {trial['rate']:g}")
        axis.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _probe(results: dict[str, Any]) -> str:
    laws = [law for law in _TITLES if any(row["law"] == law for row in results["probe"])]
    figure, axes = _panels(laws)
    for axis, law in zip(axes, laws, strict=True):
        fits = sorted((row["top_k"], row["fvu"]) for row in results["probe"] if row["law"] == law and row["fvu"])
        axis.plot(*_columns(fits), marker="o", color=_COLOURS[0], label="k dictionary atoms")
        floor = results["baselines"][law]["input_pca_floor"]
        axis.plot(
            *_columns([(int(k), fvu) for k, fvu in floor.items()]),
            marker="s",
            color="black",
            label="k principal directions",
        )
        axis.set_xlabel("active atoms k")
    axes[-1].legend(frameon=False, fontsize=8)
    return _svg(figure)
