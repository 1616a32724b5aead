"""Compensated Pruning: which branches stay, and the factor c that makes up for the others.

The abstract of MLPMoE (arXiv 2511.21089) says "variance-preserving branch reduction" and no more; every formula here is
our reading [OURS].

Axes: D model width, F neurons, N branches, K kept branches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

Which = Literal["last", "low_energy", "strided", "random"]
Factor = Literal["sqrt", "energy", "ratio", "none", "per_channel"]


def kept_branches(which: Which, energies_N: Tensor, keep: int, generator: torch.Generator) -> list[int]:
    """Indices of the ``keep`` branches that stay, ascending.

    ``last`` drops the highest indices; ``low_energy`` the smallest energies, of equal ones the later; ``strided`` keeps
    floor(i N / K); ``random`` draws without replacement.
    """
    branches = len(energies_N)
    if which == "last":
        return list(range(keep))
    if which == "strided":
        return [i * branches // keep for i in range(keep)]
    if which == "random":
        return sorted(torch.randperm(branches, generator=generator)[:keep].tolist())
    return sorted(torch.argsort(energies_N, descending=True, stable=True)[:keep].tolist())


def compensation(factor: Factor, energies_N: Tensor, kept: Sequence[int], clip: tuple[float, float]) -> float:
    """The factor c on the sum of the kept branches.

    ``sqrt``: sqrt(N / K), keeps the variance of uncorrelated branches of equal energy. ``energy``: sqrt(sum of all e /
    sum of kept e), the same for unequal ones. ``ratio``: N / K, keeps the mean. ``none``: 1. All but ``none`` are
    clipped.
    """
    if factor == "none":
        return 1.0
    if factor == "energy":
        kept_energy = float(energies_N[list(kept)].sum())
        raw = math.sqrt(float(energies_N.sum()) / kept_energy) if kept_energy > 0 else 1.0
    else:
        raw = len(energies_N) / len(kept)
        raw = math.sqrt(raw) if factor == "sqrt" else raw
    return min(max(raw, clip[0]), clip[1])


def channel_compensation(total_D: Tensor, kept_D: Tensor, clip: tuple[float, float]) -> Tensor:
    """c_j = sqrt(sum_all |W_d[j, I_i]|^2 / sum_kept |W_d[j, I_i]|^2) per output coordinate, float [D], clipped.

    Args:
        total_D: Squared norms of the rows of the whole down projection.
        kept_D: The same over the kept neurons; where it is 0 nothing can be compensated and c_j is 1.
        clip: Lowest and highest c_j.
    """
    ratio_D = torch.where(kept_D > 0, total_D / kept_D.clamp(min=torch.finfo(kept_D.dtype).tiny), 1.0)
    return ratio_D.sqrt().clamp(*clip)


def least_squares_factor(pairs_TD: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The c that minimises sum |y - c y'|^2 over pairs (y, y') of dense and pruned outputs; 1 when y' is zero."""
    cross = energy = 0.0
    for dense_TD, pruned_TD in pairs_TD:
        cross += float((dense_TD.double() * pruned_TD.double()).sum())
        energy += float(pruned_TD.double().square().sum())
    return cross / energy if energy > 0 else 1.0
