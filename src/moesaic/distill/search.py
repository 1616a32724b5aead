"""The k largest of many scores, exactly, with less work than a selection over all of them.

Axes: T tokens, E experts, K chosen ones, A and B sides of a grid of pairs (E = A B).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_GROUP = 16
"""Scores per group in the first pass."""


def top_k(z_TE: Tensor, k: int) -> Tensor:
    """Indices [T, K] of the k largest scores of each row, in no particular order.

    Two levels: at least k scores reach the k-th largest of the groups' maxima, so the k largest lie in k groups. The
    maxima cost one pass that the processor does many scores at a time; the selections see m / 16 and 16 k scores.
    """
    experts = z_TE.shape[1]
    groups = experts // _GROUP
    if k * _GROUP * 2 > experts:
        return z_TE.topk(k, dim=1, sorted=False).indices
    whole_TRG = z_TE[:, : groups * _GROUP].unflatten(1, (_GROUP, groups))
    best_TK = whole_TRG.amax(1).topk(k, dim=1, sorted=False).indices
    strides_R = torch.arange(_GROUP, device=z_TE.device) * groups
    candidates_TC = (best_TK[:, :, None] + strides_R).flatten(1)
    rest = torch.arange(groups * _GROUP, experts, device=z_TE.device).expand(len(z_TE), -1)
    candidates_TC = torch.cat([candidates_TC, rest], dim=1)
    chosen_TK = z_TE.gather(1, candidates_TC).topk(k, dim=1, sorted=False).indices
    return candidates_TC.gather(1, chosen_TK)


def top_k_pairs(left_TA: Tensor, right_TB: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k pairs of largest sum left_i + right_j: indices into A and into B, both [T, K], in no particular order.

    Exact (product keys, arXiv 1907.05242): with both sides sorted, pair (i, j) has (i+1)(j+1) - 1 pairs that are not
    worse, so only those with (i+1)(j+1) <= k can be among the k largest, about k ln k in all.
    """
    left, right = (side.topk(min(k, side.shape[1]), dim=1) for side in (left_TA, right_TB))
    first_C, second_C = _staircase(left.values.shape[1], right.values.shape[1], k)
    sums_TC = left.values[:, first_C] + right.values[:, second_C]
    chosen_TK = sums_TC.topk(k, dim=1, sorted=False).indices
    return left.indices.gather(1, first_C[chosen_TK]), right.indices.gather(1, second_C[chosen_TK])


@functools.lru_cache(maxsize=16)
def _staircase(a: int, b: int, k: int) -> tuple[Tensor, Tensor]:
    """Places (i, j) with (i+1)(j+1) <= k in a grid of a x b."""
    pairs = torch.tensor([(i, j) for i in range(a) for j in range(min(b, k // (i + 1)))])
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
