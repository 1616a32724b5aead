"""From trainings to findings: the best of each student, and dense students of equal error and of equal cost.

FVU stands beside active neurons, router MACs and total parameters always. No torch here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from moesaic.distill.spec import StudentSpec, costs

Point = tuple[float, float]
"""Width of a dense student and its FVU."""

_FLOOR = 1e-12


def best_students(trials: Iterable[dict[str, Any]], d_model: int) -> list[dict[str, Any]]:
    """Of every student and law the rate of least validation FVU, with costs and, for MoE, the dense comparisons.

    Keys of a row: law, spec, family and split (of :class:`StudentSpec`), rate, fvu, validation, epoch, active,
    neuron_macs, router_macs, macs, parameters; for MoE students also ``gain`` (width of the dense student of equal FVU
    over active neurons; None outside the dense curve) and ``equal_macs`` (width of the dense student of as many
    multiply-accumulates, its FVU, and the ratio of the MoE student's FVU to that; None outside the curve).
    """
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for trial in trials:
        if trial["spec"] is None or trial["fvu"] is None:
            continue
        key = trial["law"], StudentSpec.model_validate(trial["spec"]).identity()
        if key not in best or trial["validation"] < best[key]["validation"]:
            best[key] = trial
    rows = [_row(trial, d_model) for trial in best.values()]
    for law in {row["law"] for row in rows}:
        mine = [row for row in rows if row["law"] == law]
        curve = dense_curve(mine)
        for row in mine:
            if row["spec"]["experts"]:
                row |= _comparisons(row, curve, d_model)
    return rows


def dense_curve(rows: Iterable[dict[str, Any]]) -> list[Point]:
    """Width and FVU of the dense students, ascending in width; a wider one is never counted as worse."""
    points: list[Point] = []
    for width, fvu in sorted((row["active"], row["fvu"]) for row in rows if not row["spec"]["experts"]):
        points.append((width, min(fvu, points[-1][1]) if points else fvu))
    return points


def width_of(fvu: float, curve: Sequence[Point]) -> float | None:
    """Width at which the dense curve has this FVU, log-log interpolated; None outside the curve."""
    for (w0, f0), (w1, f1) in itertools.pairwise(curve):
        if f1 <= fvu <= f0:
            if f0 == f1:
                return w0
            return math.exp(_line((_log(f0), math.log(w0)), (_log(f1), math.log(w1)), _log(fvu)))
    return None


def fvu_at(width: float, curve: Sequence[Point]) -> float | None:
    """The dense curve's FVU at a width, log-log interpolated; None outside the curve."""
    for (w0, f0), (w1, f1) in itertools.pairwise(curve):
        if w0 <= width <= w1:
            return math.exp(_line((math.log(w0), _log(f0)), (math.log(w1), _log(f1)), math.log(width)))
    return None


def _log(value: float) -> float:
    return math.log(max(value, _FLOOR))


def _line(start: Point, stop: Point, x: float) -> float:
    return start[1] + (stop[1] - start[1]) * (x - start[0]) / (stop[0] - start[0])


def _row(trial: dict[str, Any], d_model: int) -> dict[str, Any]:
    spec = StudentSpec.model_validate(trial["spec"])
    cost = costs(spec, d_model)
    return {key: trial[key] for key in ("law", "spec", "rate", "fvu", "validation", "epoch")} | {
        "family": spec.family,
        "split": spec.split,
        "active": cost.active,
        "neuron_macs": cost.neuron_macs,
        "router_macs": cost.router_macs,
        "macs": cost.macs,
        "parameters": cost.parameters,
    }


def _comparisons(row: dict[str, Any], curve: Sequence[Point], d_model: int) -> dict[str, Any]:
    same_error = width_of(row["fvu"], curve)
    width = costs(StudentSpec.model_validate(row["spec"]), d_model).equal_dense_width(d_model)
    dense = fvu_at(width, curve)
    equal = None if dense is None else {"width": width, "fvu": dense, "ratio": row["fvu"] / max(dense, _FLOOR)}
    return {"gain": None if same_error is None else same_error / row["active"], "equal_macs": equal}


def probe_rows(trials: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The dictionary fits: law, atoms, top_k, fvu."""
    keys = ("law", "atoms", "top_k", "fvu", "epoch")
    return [{key: trial[key] for key in keys} for trial in trials if trial["spec"] is None]
