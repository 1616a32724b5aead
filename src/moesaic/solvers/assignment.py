"""Balanced assignment: every row to one column, every column exactly full, at least total cost.

The transport problem of balanced clustering. Solved as a min-cost flow with one sink per column (N x E arcs), not by
repeating each column up to its capacity and matching N x N: the same optimum for a fraction of the time and memory.

Axes: N rows (neurons), E columns (experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The solver multiplies costs by the number of nodes and sums them along paths in int64: keep costs * nodes^2 < 2^62.
_SOLVER_BITS = 62
_MAX_COST_BITS = 40


def balanced_assignment(cost_NE: Tensor, capacities: Sequence[int]) -> Tensor:
    """Labels int64 [N] that minimise ``sum_n cost_NE[n, label_n]`` with exactly ``capacities[e]`` rows labelled e.

    Precision: each row's minimum is subtracted (this moves no optimum), then costs are scaled by a power of two to at
    most b = 40 bits and rounded; above 2,047 nodes b = 62 - 2 log2(N + E), or int64 would overflow. The rounded
    problem is solved exactly. So integer costs that differ by less than 2^b within a row are solved exactly, and for
    real costs the total is within ``N * range * 2^(1 - b)`` of the optimum, range being the largest difference within a
    row.

    Deterministic: single-threaded, no random numbers. Which of several equal optima is returned depends on the order of
    rows and columns and on the OR-Tools release, and on nothing else.

    Args:
        cost_NE: Finite real costs [N, E], any float or integer dtype; read in float64.
        capacities: E non-negative integers that sum to N.

    Raises:
        ValueError: Shapes that do not fit, capacities that do not sum to N, costs that are not finite.
    """
    _check(cost_NE, capacities)
    rows, columns = cost_NE.shape
    if rows == 0:
        return torch.empty(0, dtype=torch.int64)
    flow_NE = _min_cost_flow(_integer_costs(cost_NE), np.asarray(capacities, dtype=np.int64))
    return torch.from_numpy(flow_NE.reshape(rows, columns).argmax(axis=1))


def _check(cost_NE: Tensor, capacities: Sequence[int]) -> None:
    if cost_NE.dim() != 2 or cost_NE.shape[1] != len(capacities):
        raise ValueError(f"costs of shape {tuple(cost_NE.shape)} for {len(capacities)} capacities")
    if min(capacities, default=0) < 0 or sum(capacities) != cost_NE.shape[0]:
        raise ValueError(f"capacities {list(capacities)} must be >= 0 and sum to the {cost_NE.shape[0]} rows")
    if not bool(torch.isfinite(cost_NE).all()):
        raise ValueError("assignment costs contain NaN or Inf")


def _integer_costs(cost_NE: Tensor) -> np.ndarray:
    cost = cost_NE.detach().to("cpu", torch.float64).numpy()
    cost = cost - cost.min(axis=1, keepdims=True)
    bits = min(_MAX_COST_BITS, _SOLVER_BITS - 2 * sum(cost.shape).bit_length())
    # cost.max() < 2^exponent, so the scaled maximum stays below 2^bits; scaling by a power of two rounds nothing.
    exponent = int(np.frexp(cost.max())[1])
    return np.rint(np.ldexp(cost, bits - exponent)).astype(np.int64)


def _min_cost_flow(cost_NE: np.ndarray, capacities_E: np.ndarray) -> np.ndarray:
    """Flow on the N x E arcs, row-major: 1 where a row goes to a column."""
    from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

    rows, columns = cost_NE.shape
    solver: Any = SimpleMinCostFlow()  # its type stubs take dtypes for shapes
    tails = np.repeat(np.arange(rows, dtype=np.int32), columns)
    heads = np.tile(np.arange(rows, rows + columns, dtype=np.int32), rows)
    arcs = solver.add_arcs_with_capacity_and_unit_cost(
        tails, heads, np.ones(rows * columns, dtype=np.int64), cost_NE.ravel()
    )
    supplies = np.concatenate([np.ones(rows, dtype=np.int64), -capacities_E])
    solver.set_nodes_supplies(np.arange(rows + columns, dtype=np.int32), supplies)
    status = solver.solve()
    if status != solver.OPTIMAL:  # a balanced, complete problem always has one: only overflow can lead here
        raise ArithmeticError(f"min-cost flow ended with {status.name} on {rows} x {columns} costs")
    return solver.flows(arcs)
