"""ToMoE's regularisers (arXiv 2501.15316, section on the training objective).

Axes: T tokens, F neurons, L layers, N experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.train.parallel import mean_over_processes

_C = 0.001


def log_ratio(x: Tensor, y: float | Tensor) -> Tensor:
    """ln of the larger over the smaller, both plus c = 0.001: symmetric, never negative, 0 where x = y."""
    return ((x + _C) / (y + _C)).log().abs()


def budget_loss(ratio: Tensor, target: float) -> Tensor:
    """R_P: distance of the active ratio T_act / T_total from the target p."""
    return log_ratio(ratio, target)


def coverage(masks_NF: Tensor) -> Tensor:
    """U: share of neurons that some expert holds, a soft OR over the experts.

    Its gradient reaches a neuron of an expert only where no other expert holds it; torch computes it without
    dividing by 1 - S, which may be 0.
    """
    return 1 - torch.prod(1 - masks_NF, dim=-2).mean(-1)


def union_loss(masks_LNF: Sequence[Tensor]) -> Tensor:
    """R_U, mean over the FFNs of the log-ratio of their coverage to 1.

    The reference divides by the number of all sub-modules, twice as many: its weight 3 is 1.5 here.
    """
    return torch.stack([log_ratio(coverage(masks_NF), 1.0) for masks_NF in masks_LNF]).mean()


def balance_loss(choices: Sequence[Tensor], probabilities: Sequence[Tensor]) -> Tensor:
    """R_L, mean over the FFNs of sum_e f_e P_e: 1/N when balanced, 1 when one expert takes all; Switch's is N times it.

    Args:
        choices: Per FFN, the hard routes [T, N]; f_e is the share of tokens of e, without gradient.
        probabilities: Per FFN, what P_e averages over the tokens [T, N].
    """
    terms = []
    for choice_TN, probability_TN in zip(choices, probabilities, strict=True):
        load_N = mean_over_processes(choice_TN.detach().flatten(0, -2).mean(0))
        mean_N = mean_over_processes(probability_TN.flatten(0, -2).mean(0))
        terms.append((load_N / load_N.sum() * mean_N).sum())
    return torch.stack(terms).mean()
