"""Fractal Fade's schedules: how much of each branch goes.

MLPMoE (arXiv 2511.21089) says "differential branch sparsity" and no more in public; the formulas are our reading
[OURS].
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "power", "dyadic"]


def fade_fractions(
    schedule: Schedule, branches: int, s_min: float, s_max: float, gamma: float = 2.0
) -> tuple[float, ...]:
    """Sparsity s_i of branch i = 0..N-1, nondecreasing, s_0 = s_min and (for N > 1) s_{N-1} = s_max.

    s_i = s_min + (s_max - s_min) t_i. ``linear``: t_i = i / (N - 1). ``power``: its power gamma. ``dyadic``: t_i =
    (1 - 2^-j) / (1 - 2^-J) on the groups j = floor(log2(i + 1)), which double in size; J = floor(log2 N).
    """
    return tuple(s_min + (s_max - s_min) * _rise(schedule, i, branches, gamma) for i in range(branches))


def _rise(schedule: Schedule, i: int, branches: int, gamma: float) -> float:
    if branches == 1:
        return 0.0
    if schedule == "dyadic":
        # bit_length is floor(log2) + 1 without rounding trouble
        group, last = (i + 1).bit_length() - 1, branches.bit_length() - 1
        return (1 - math.ldexp(1, -group)) / (1 - math.ldexp(1, -last))
    step = i / (branches - 1)
    return step**gamma if schedule == "power" else step
