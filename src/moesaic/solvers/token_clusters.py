"""Overlapping experts for groups of tokens, by Lloyd alternation with a linear router in the loop.

Source: ours [OURS]. An expert is a set of neurons, and sets may overlap. Rounds of: the sets that keep most of the
output energy of their tokens; a linear router, ridge on the energies that the sets keep; tokens go where the router
sends them, so that the router's limits shape the sets. Then the router is refined for the energy that its choice keeps,
and the sets follow once more.

Axes: T tokens, D model width, F neurons, E experts, S neurons shared by all experts, M other neurons per expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.solvers.products import BLOCK, block_product, rounded_products
from moesaic.solvers.router_fit import (
    FactoredRidge,
    RidgeStatistics,
    energy_shares,
    energy_targets,
    refine_softmax,
    top_k_sets,
)
from moesaic.solvers.team import ALONE, Team

_TINY = 1e-30
_TOKENS = 2048  # of a product, whatever the number of processes
_FIRST_ROUNDS = 5  # of spherical k-means, for the first clusters
_FIRST_TOKENS = 4096  # from which these are made
_FIRST_PER_EXPERT = 32  # of them, at least
REFINEMENTS = 2
"""Of the router, with new sets between them."""


@dataclass(frozen=True)
class TokenClusters:
    """Experts and their router.

    Attributes:
        shared_F: Neurons that every token uses, bool.
        own_EF: Neurons that an expert has besides, bool.
        router_ED: Linear router, float32; the largest score is the token's expert.
        kept: Share of the output energy that the routed experts keep, mean over the tokens of the fit; over those that
            were held out where widths differ.
        load_E: Share of these tokens that each expert gets, where widths differ.
        worth_EF: Mean energy share of each neuron over each expert's tokens, over the price, float16, where widths
            differ.
    """

    shared_F: Tensor
    own_EF: Tensor
    router_ED: Tensor
    kept: float
    load_E: Tensor | None = None
    worth_EF: Tensor | None = None


def neuron_shares(h_TF: Tensor, norm_F: Tensor) -> Tensor:
    """(h_i |W_d[:, i]|)^2 over the token's sum, so that every token counts alike, float32 [T, F].

    Without this a few tokens with massive activations would own most of a layer's energy.
    """
    return energy_shares((h_TF.float() * norm_F.float()).square_())


def cluster_tokens(
    x_TD: Tensor,
    share_TF: Tensor,
    experts: int,
    sizes: tuple[int, int],
    *,
    rounds: int,
    ridge: float,
    seed: int,
    router_steps: int = 0,
    team: Team = ALONE,
) -> TokenClusters:
    """Alternate between neuron sets, router and token assignment; the round that keeps most energy wins.

    Args:
        x_TD: Inputs of the FFN, float32.
        share_TF: From :func:`neuron_shares`.
        experts: E.
        sizes: (S, M).
        rounds: Most rounds with the ridge router; they end early when no token moves.
        ridge: Strength of the router's ridge, relative to the mean square of an input coordinate.
        seed: Of the first clusters and of the refinement's samples.
        router_steps: Steps of each refinement of the router (:func:`~moesaic.solvers.router_fit.refine_softmax`).
        team: Processes that all have the tokens and share out products over them.
    """
    factored = FactoredRidge.of(x_TD, ridge)

    def by_ridge(kept_TE: Tensor, _: Tensor | None) -> Tensor:
        return factored.solve(x_TD.T @ energy_targets(kept_TE, "raw"))

    def by_steps(kept_TE: Tensor, router_ED: Tensor | None) -> Tensor:
        assert router_ED is not None
        with rounded_products(share_TF.dtype == torch.bfloat16):
            return refine_softmax(router_ED, x_TD, kept_TE, router_steps, seed)

    alternate = partial(_alternate, x_TD, share_TF, experts, sizes, team=team)
    best = alternate(first_clusters(share_TF, experts, seed, team), None, rounds, by_ridge)
    if router_steps == 0 or experts == 1:
        return best
    refined = alternate((x_TD @ best.router_ED.T).argmax(dim=1), best.router_ED, REFINEMENTS, by_steps)
    return max(best, refined, key=lambda clusters: clusters.kept)


def _alternate(
    x_TD: Tensor,
    share_TF: Tensor,
    experts: int,
    sizes: tuple[int, int],
    expert_T: Tensor,
    router_ED: Tensor | None,
    rounds: int,
    fit: Callable[[Tensor, Tensor | None], Tensor],
    team: Team,
) -> TokenClusters:
    """Rounds of sets for the tokens' experts, router, tokens; ``fit`` makes the router of the energies that the sets
    keep and the router before."""
    mean_F = mean_rows(share_TF)
    best: TokenClusters | None = None
    for _ in range(rounds):
        # One average token more: a cluster without tokens gets the static choice, a small one leans to it.
        shared_F, own_EF = choose_neurons(sums_by_expert(share_TF, expert_T, experts) + mean_F, *sizes)
        kept_TE = kept_energy(share_TF, own_EF | shared_F, team)
        router_ED = fit(kept_TE, router_ED)
        routed_T = (x_TD @ router_ED.T).argmax(dim=1)
        kept = float(kept_TE.gather(1, routed_T[:, None]).mean())
        if best is None or kept > best.kept:
            best = TokenClusters(shared_F, own_EF, router_ED, kept)
        if torch.equal(routed_T, expert_T):
            break
        expert_T = routed_T
    assert best is not None
    return best


def choose_neurons(score_EF: Tensor, shared: int, own: int) -> tuple[Tensor, Tensor]:
    """S neurons for all experts, and M more of largest score for each: (shared_F, own_EF), bool.

    Shared are those that most experts would have among their S + M best; of equal ones those of larger total score.
    """
    total_F = score_EF.sum(dim=0)
    popularity_F = largest(score_EF, shared + own).sum(dim=0) + 0.5 * total_F / total_F.max().clamp(min=_TINY)
    shared_F = largest(popularity_F[None], shared)[0]
    return shared_F, largest(score_EF.masked_fill(shared_F, -1.0), own)


def largest(score_EF: Tensor, count: int) -> Tensor:
    """Which ``count`` entries of each row are largest, bool; of equal ones those of lower index."""
    return top_k_sets(score_EF, count).bool()


def predicted_patterns(x_TD: Tensor, share_TF: Tensor, ridge: float) -> Tensor:
    """Rows [F, D], float32, whose inner products are those of the neurons' amplitudes sqrt(q_ti) as a linear map of x
    predicts them, averaged over tokens: neurons with near rows are wanted, predictably, by the same tokens."""
    statistics = RidgeStatistics.collect([(x_TD, share_TF.sqrt())])
    weight_FD = statistics.solve(ridge)
    gram_DD = statistics.xx_DD / len(x_TD)
    gram_DD.diagonal().add_(1e-4 * gram_DD.diagonal().mean().clamp(min=_TINY))
    return weight_FD @ torch.linalg.cholesky(gram_DD).float()


def first_clusters(share_TF: Tensor, experts: int, seed: int, team: Team = ALONE) -> Tensor:
    """Spherical k-means on the energy patterns (roots of the shares have length 1) from random tokens.

    The centres are those of a sample: the rounds that follow move the tokens anyway (docs/lab-notes.md).

    Returns the cluster of each token, int64 [T].
    """
    # At random: every so many tokens could be the first ones of all windows, which are alike.
    order_T = torch.randperm(len(share_TF), generator=torch.Generator().manual_seed(seed))
    sample_SF = share_TF[order_T[: max(_FIRST_TOKENS, _FIRST_PER_EXPERT * experts)].to(share_TF.device)].sqrt()
    centre_EF = sample_SF[torch.arange(experts, device=sample_SF.device) % len(sample_SF)]
    for _ in range(_FIRST_ROUNDS):
        expert_S = _nearest(sample_SF, centre_EF, team)
        centre_EF = F.normalize(sums_by_expert(sample_SF, expert_S, experts), dim=1)
    return _nearest(share_TF.sqrt(), centre_EF, team)


def _nearest(pattern_TF: Tensor, centre_EF: Tensor, team: Team) -> Tensor:
    """The centre most like each pattern, int64 [T]. Those of 16-bit patterns have no more digits."""
    with rounded_products(pattern_TF.dtype == torch.bfloat16):
        return team.rows(len(pattern_TF), BLOCK, lambda rows: block_product(pattern_TF[rows], centre_EF).argmax(dim=1))


def kept_energy(share_TF: Tensor, own_EF: Tensor, team: Team = ALONE) -> Tensor:
    """Share of each token's energy that each set keeps, float32 [T, E]. 16-bit shares give 16-bit sums: as targets of a
    router they differ by less than tokens of one expert do."""
    member_FE = own_EF.to(share_TF.dtype).T

    def kept(rows: slice) -> Tensor:
        return torch.cat([(share_BF @ member_FE).float() for share_BF in share_TF[rows].split(_TOKENS)])

    return team.rows(len(share_TF), _TOKENS, kept)


def sums_by_expert(rows_TF: Tensor, expert_T: Tensor, experts: int) -> Tensor:
    """Sums of the rows of each expert's tokens, float32 [E, F]; a product with 0/1 takes several times as long."""
    sum_EF = torch.zeros(experts, rows_TF.shape[1], dtype=torch.float32, device=rows_TF.device)
    for rows_BF, expert_B in zip(rows_TF.split(BLOCK), expert_T.split(BLOCK), strict=True):
        sum_EF.index_add_(0, expert_B, rows_BF.float())
    return sum_EF


def mean_rows(rows_TF: Tensor) -> Tensor:
    """The mean row, float32 [F]."""
    total_F = torch.zeros(rows_TF.shape[1], dtype=torch.float32, device=rows_TF.device)
    for rows_BF in rows_TF.split(BLOCK):
        total_F += rows_BF.float().sum(dim=0)
    return total_F / len(rows_TF)
