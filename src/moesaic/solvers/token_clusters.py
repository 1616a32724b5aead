"""Overlapping experts for groups of tokens, by Lloyd alternation with a linear router in the loop.

Source: ours [OURS]. An expert is a set of neurons, and sets may overlap. Rounds of: the sets that keep most of the
output energy of their tokens; a linear router, ridge on the energies that the sets keep; tokens go where the router
sends them, so that the router's limits shape the sets.

Axes: T tokens, D model width, F neurons, E experts, S neurons shared by all experts, W neurons per expert with these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.solvers.router_fit import RidgeStatistics

_TINY = 1e-30
_FIRST_ROUNDS = 5  # of spherical k-means, for the first clusters


@dataclass(frozen=True)
class TokenClusters:
    """Experts and their router.

    Attributes:
        member_EF: Neurons of each expert, bool, ``width`` per row; the shared ones are in every row.
        shared_F: Neurons that are stored once, bool.
        router_ED: Linear router, float32; the largest score is the token's expert.
        kept: Share of the output energy that the routed experts keep, mean over the tokens of the fit.
        kept_oracle: The same if each token had its best expert.
    """

    member_EF: Tensor
    shared_F: Tensor
    router_ED: Tensor
    kept: float
    kept_oracle: float


def energy_share(h_TF: Tensor, norm_F: Tensor) -> Tensor:
    """(h_i |W_d[:, i]|)^2 over the token's sum, so that every token counts alike, float32 [T, F].

    Without this a few tokens with massive activations would own most of a layer's energy.
    """
    energy_TF = (h_TF.float() * norm_F.float()).square_()
    return energy_TF.div_(energy_TF.sum(dim=1, keepdim=True).clamp_(min=_TINY))


def cluster_tokens(
    x_TD: Tensor, share_TF: Tensor, experts: int, width: int, shared: int, *, rounds: int, ridge: float, seed: int
) -> TokenClusters:
    """Alternate between neuron sets, router and token assignment; the round that keeps most energy wins.

    Args:
        x_TD: Inputs of the FFN, float32.
        share_TF: From :func:`energy_share`.
        experts: E.
        width: Neurons that one token uses, W.
        shared: Neurons S of these that are the same for all tokens, S <= W.
        rounds: Most rounds; ends early when no token moves.
        ridge: Strength of the router's ridge, relative to the mean square of an input coordinate.
        seed: Of the first clusters.
    """
    mean_F = share_TF.mean(dim=0)
    gram = RidgeStatistics.collect([(x_TD, x_TD.new_zeros(len(x_TD), 1))])
    assigned_T = _first_clusters(share_TF, experts, seed)
    best: TokenClusters | None = None
    for _ in range(max(1, rounds)):
        # one average token more: an empty cluster gets the static choice, a small one leans to it
        one_hot_TE = F.one_hot(assigned_T, experts).to(share_TF.dtype)
        score_EF = one_hot_TE.T @ share_TF + mean_F
        member_EF, shared_F = choose_neurons(score_EF, width, shared)
        kept_TE = share_TF @ member_EF.to(share_TF.dtype).T
        target_TE = kept_TE - kept_TE.mean(dim=1, keepdim=True)
        router_ED = RidgeStatistics(gram.xx_DD, (x_TD.T @ target_TE).double()).solve(ridge)
        routed_T = assign(x_TD, router_ED)
        kept = float(kept_TE.gather(1, routed_T[:, None]).mean())
        if best is None or kept > best.kept:
            best = TokenClusters(member_EF, shared_F, router_ED, kept, float(kept_TE.amax(dim=1).mean()))
        if torch.equal(routed_T, assigned_T):
            break
        assigned_T = routed_T
    assert best is not None
    return best


def assign(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """The expert of every token, int64 [T]; of equal scores the lower index, as in the runtime."""
    score_TE = x_TD @ router_ED.T
    return score_TE.sort(dim=1, descending=True, stable=True).indices[:, 0]


def choose_neurons(score_EF: Tensor, width: int, shared: int) -> tuple[Tensor, Tensor]:
    """Sets of ``width`` neurons of largest score per expert, ``shared`` of them common to all: (member_EF, shared_F).

    Shared are those that most experts would take, of equal ones those of larger total score; bool.
    """
    free_EF = largest(score_EF, width)
    total_F = score_EF.sum(dim=0)
    popularity_F = free_EF.sum(dim=0) + total_F / (2 * total_F.sum()).clamp(min=_TINY)
    shared_F = largest(popularity_F[None], shared)[0]
    own_EF = largest(score_EF.masked_fill(shared_F, -1.0), width - shared)
    return own_EF | shared_F, shared_F


def largest(score_EF: Tensor, count: int) -> Tensor:
    """Which ``count`` entries of each row are largest, bool; of equal ones those of lower index."""
    index_EC = score_EF.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros(score_EF.shape, dtype=torch.bool).scatter_(1, index_EC, True)


def _first_clusters(share_TF: Tensor, experts: int, seed: int) -> Tensor:
    """Spherical k-means on the energy patterns (roots of the shares have length 1) from random tokens, int64 [T]."""
    pattern_TF = share_TF.sqrt()
    order_T = torch.randperm(len(pattern_TF), generator=torch.Generator().manual_seed(seed))
    centre_EF = pattern_TF[order_T[torch.arange(experts) % len(order_T)]]
    for _ in range(_FIRST_ROUNDS):
        one_hot_TE = F.one_hot((pattern_TF @ centre_EF.T).argmax(dim=1), experts).to(pattern_TF.dtype)
        centre_EF = F.normalize(one_hot_TE.T @ pattern_TF, dim=1)
    return (pattern_TF @ centre_EF.T).argmax(dim=1)
