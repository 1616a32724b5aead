"""Loss-free load balancing by a bias on the choice of experts (CMoE, arXiv 2502.04416, section 5).

Axes: T tokens, E experts, K active.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_balance_bias(bias_E: Tensor, load_E: Tensor, step: float) -> Tensor:
    """One update: ``b_e - step`` where the load is over the mean, ``+ step`` where it is under, unchanged where equal.

    ``load_E``: tokens (or shares) that each expert received in the batch.
    """
    load_E = load_E.double()
    return bias_E - step * torch.sign(load_E - load_E.mean()).to(bias_E.dtype)


def expert_load(prob_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """Tokens that choose each expert when the ``k`` largest of ``prob_TE + bias_E`` win, int64 [E]; ties: lowest."""
    order_TE = torch.sort(prob_TE + bias_E, dim=1, descending=True, stable=True).indices
    return torch.bincount(order_TE[:, :k].flatten(), minlength=prob_TE.shape[1])


def balance_bias(prob_TE: Tensor, k: int, steps: int, step: float, batch: int) -> Tensor:
    """The bias [E] after ``steps`` updates from zero, on consecutive batches of tokens, starting over at the end.

    [OURS]: the paper updates the bias only while it trains, by a constant step; here calibration tokens do, no weight
    changes, and the step shrinks linearly to ``step / steps``: a constant one swings about the optimum for ever where
    the probabilities lie closer together than ``step``.
    """
    bias_E = prob_TE.new_zeros(prob_TE.shape[1])
    batches = prob_TE.split(batch)
    for number in range(steps):
        bias_E = update_balance_bias(
            bias_E, expert_load(batches[number % len(batches)], bias_E, k), step * (1 - number / steps)
        )
    return bias_E
