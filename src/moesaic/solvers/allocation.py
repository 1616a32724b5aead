"""Sharing a budget of active neurons out over the layers of a model, so that least is lost.

Source: ours [OURS]. What a layer loses when it alone is cut is taken as a power of the share that is cut, and the
losses of layers as a sum; the true loss is larger, docs/methods/token_clusters.md says by how much. Under these
assumptions leading or any dense layers are found exactly by counting, free widths by dynamic programming on a grid.

Axes: L layers, F neurons of a dense FFN, B neurons of the budget, C candidate widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesaic.errors import InputError

if TYPE_CHECKING:
    from moesaic.solvers.limits import AllocationMode as Mode

GRID = 32
"""Free widths are multiples of F / GRID neurons, rounded down, and F itself."""
_TINY = 1e-9  # nats: a layer that loses nothing still takes part in the fit
_ONE_POINT = 2.0  # power where only one fraction was measured


@dataclass(frozen=True)
class Curve:
    """Loss of one layer with the fraction f of its neurons: ``scale`` (1 - f)^``power``."""

    scale: float
    power: float

    @classmethod
    def fit(cls, losses: Mapping[float, float]) -> Curve:
        """Least squares in logarithms through measured losses by fraction; the power is at least 1."""
        cut = np.log([1 - fraction for fraction in losses])
        lost = np.log([max(loss, _TINY) for loss in losses.values()])
        power = max(1.0, float(np.polyfit(cut, lost, 1)[0])) if len(losses) > 1 else _ONE_POINT
        return cls(math.exp(float((lost - power * cut).mean())), power)

    def __call__(self, fraction: float) -> float:
        """The loss at ``fraction``; 0 at 1."""
        return self.scale * (1 - fraction) ** self.power


def allocate(
    curves: Sequence[Curve], d_ff: int, active: int, mode: Mode, allowed: Callable[[int], bool] = lambda _: True
) -> tuple[int, ...]:
    """Active neurons of every layer, d_ff for one that stays dense; the sum is at most ``active`` times the layers.

    It falls short of that by less than one neuron per converted layer; with ``widths`` by less than one step of the
    grid, and where the grid does not divide F one more per dense layer.

    Args:
        curves: One per layer.
        d_ff: F.
        active: Neurons that a layer would have if all were equal.
        mode: See :class:`moesaic.adjust.allocation_config.AllocationConfig`.
        allowed: Which numbers below F the method can make.

    Raises:
        InputError: the method can make none of the numbers that the budget leaves.
    """
    found = _widths(curves, d_ff, active, allowed) if mode == "widths" else _dense(curves, d_ff, active, mode, allowed)
    if found is None:
        raise InputError(
            f"no way to share out {active} of {d_ff} active neurons per layer", "choose another active fraction"
        )
    return found


def loss(curves: Sequence[Curve], neurons: Sequence[int], d_ff: int) -> float:
    """Sum of the layers' losses."""
    return sum(curve(count / d_ff) for curve, count in zip(curves, neurons, strict=True))


def _dense(
    curves: Sequence[Curve], d_ff: int, active: int, mode: Mode, allowed: Callable[[int], bool]
) -> tuple[int, ...] | None:
    """The best number n of dense layers: given n, the width of the others follows, and with it what each would lose."""
    layers = len(curves)
    best: tuple[float, tuple[int, ...]] | None = None
    for n in range(layers):
        width = (active * layers - n * d_ff) // (layers - n)
        if width < 1:
            break
        if not allowed(width):
            continue
        order = list(range(layers))
        if mode == "any":
            order.sort(key=lambda layer: -curves[layer](width / d_ff))
        neurons = tuple(d_ff if layer in order[:n] else width for layer in range(layers))
        lost = loss(curves, neurons, d_ff)
        if best is None or lost < best[0]:
            best = lost, neurons
    return None if best is None else best[1]


def _widths(curves: Sequence[Curve], d_ff: int, active: int, allowed: Callable[[int], bool]) -> tuple[int, ...] | None:
    """Least total loss over all choices from the grid, by dynamic programming over layers and neurons spent."""
    step = max(1, d_ff // GRID)
    width_C = [width for width in range(step, d_ff, step) if allowed(width)] + [d_ff]
    budget = active * len(curves) // step
    spent_C = [-(-width // step) for width in width_C]
    best_B = np.zeros(budget + 1)  # least loss of the layers so far with at most this much spent
    chosen = []
    for curve in curves:
        option_CB = np.full((len(width_C), budget + 1), np.inf)
        for option_B, width, spent in zip(option_CB, width_C, spent_C, strict=True):
            if spent <= budget:
                option_B[spent:] = best_B[: budget + 1 - spent] + curve(width / d_ff)
        chosen.append(option_CB.argmin(axis=0))
        best_B = option_CB.min(axis=0)
    if not np.isfinite(best_B[budget]):
        return None
    neurons: list[int] = []
    for choice_B in reversed(chosen):
        choice = int(choice_B[budget])
        neurons.append(width_C[choice])
        budget -= spent_C[choice]
    return tuple(reversed(neurons))
