"""Overlapping experts of different widths: neurons where they pay, so many in the mean over tokens.

Source: ours [OURS]. Tokens differ in how many neurons their output needs. With a price for using a neuron, an expert
has those neurons whose mean energy share over its tokens is above the price, and a token gains what its expert keeps
minus what that costs. The router is fitted to gains, so that tokens which need little go to narrow experts. The price
is that at which tokens which built neither experts nor router use the wanted number in the mean: on the tokens of the
fit the same sets would look cheaper than they are.

Axes: T tokens, H of them held out, D model width, F neurons, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.solvers.products import block_product, rounded_products
from moesaic.solvers.router_fit import FactoredRidge, energy_targets, refine_softmax
from moesaic.solvers.team import ALONE, Team
from moesaic.solvers.token_clusters import (
    REFINEMENTS,
    TokenClusters,
    first_clusters,
    kept_energy,
    largest,
    mean_rows,
    sums_by_expert,
)

_HELD_OUT = 8  # one of so many blocks of tokens sets the price
_BLOCK = 1024  # tokens of a block; of shorter ones the text on both sides gives too much away (docs/lab-notes.md)


def held_out(tokens: int) -> Tensor:
    """Which tokens set the price, bool [T]: one of eight blocks of 1,024, of shorter blocks where there are few
    tokens; none below 16 tokens.

    Its place among the eight moves on: windows have a number of tokens that eight blocks divide, or the reverse, and
    the price would else be that of one position in them.
    """
    size = min(_BLOCK, tokens // (2 * _HELD_OUT))
    if size == 0:
        return torch.zeros(tokens, dtype=torch.bool)
    block_T = torch.arange(tokens) // size
    return block_T % _HELD_OUT == (_HELD_OUT - 1 - block_T // _HELD_OUT) % _HELD_OUT


_LARGEST_WORTH = 6e4  # of float16
_LOWER = 16  # bits of a float32 that are looked at last


def lowest_price(mean_EF: Tensor, count_E: Tensor, active: float) -> float:
    """The lowest price at which ``count_E`` tokens per expert use at most ``active`` neurons in the mean.

    Args:
        mean_EF: Mean energy share of each neuron over an expert's tokens; the expert has those above the price.
        count_E: Tokens of each expert.
        active: Neurons per token.
    """
    # The largest value such that all of it or more cost too much. Floats >= 0 are ordered as their bits, so the value
    # is found by its upper bits, then by its lower ones.
    bits_EF = mean_EF.float().abs().contiguous().view(torch.int32)  # a zero may have a sign
    upper, over = _first_over(bits_EF >> _LOWER, count_E, active * float(count_E.sum()))
    if over is None:
        return 0.0
    lower_EF = torch.where(bits_EF >> _LOWER == upper, bits_EF & ((1 << _LOWER) - 1), -1)
    lower, _ = _first_over(lower_EF, count_E, over)
    return float(torch.tensor(upper << _LOWER | lower, dtype=torch.int32).view(torch.float32))


def _first_over(value_EF: Tensor, count_E: Tensor, allowed: float) -> tuple[int, float | None]:
    """The largest value such that neurons of it or more are used by more tokens than allowed, and what neurons above it
    leave of that; (0, None) where all are allowed. A value of -1 does not count."""
    tokens_EF = count_E.double()[:, None].expand_as(value_EF)
    used_V = torch.bincount(value_EF.flatten() + 1, tokens_EF.flatten())[1:]
    from_V = used_V.flip(0).cumsum(0).flip(0)
    over_V = (from_V > allowed).nonzero()
    if not len(over_V):
        return 0, None
    value = int(over_V[-1])
    return value, allowed - float(from_V[value] - used_V[value])


@dataclass
class _Tokens:
    """Inputs and energy shares of the tokens that build the experts, and of those that set the price; and the mean
    share of the first."""

    x_TD: Tensor
    share_TF: Tensor
    held_x_HD: Tensor
    held_share_HF: Tensor
    allowed_F: Tensor
    mean_F: Tensor

    @classmethod
    def split(cls, x_TD: Tensor, share_TF: Tensor, allowed_F: Tensor) -> _Tokens:
        held_T = held_out(len(x_TD)).to(x_TD.device)
        if not held_T.any():
            return cls(x_TD, share_TF, x_TD, share_TF, allowed_F, mean_rows(share_TF))
        built_TF = share_TF[~held_T]
        return cls(x_TD[~held_T], built_TF, x_TD[held_T], share_TF[held_T], allowed_F, mean_rows(built_TF))


@dataclass
class _State:
    """Sets and price for the experts that the tokens have now, and what held-out tokens keep by them."""

    mean_EF: Tensor
    own_EF: Tensor
    price: float
    load_E: Tensor
    kept: float


def cluster_tokens_freely(
    x_TD: Tensor,
    share_TF: Tensor,
    experts: int,
    active: int,
    *,
    rounds: int,
    ridge: float,
    seed: int,
    router_steps: int = 0,
    allowed_F: Tensor | None = None,
    team: Team = ALONE,
) -> TokenClusters:
    """As :func:`moesaic.solvers.token_clusters.cluster_tokens` with widths of the experts' own and nothing shared.

    Args:
        x_TD: Inputs of the FFN, float32.
        share_TF: From :func:`moesaic.solvers.token_clusters.neuron_shares`.
        experts: E.
        active: Neurons that a token uses in the mean, by the loads of the tokens that set the price.
        rounds: Most rounds with the ridge router; they end early when held-out tokens keep no more.
        ridge: Strength of the router's ridge, relative to the mean square of an input coordinate.
        seed: Of the first clusters and of the refinement's samples.
        router_steps: Steps of each refinement of the router.
        allowed_F: Neurons that experts may have, bool; the others have no shares. None: all.
        team: Processes that all have the tokens and share out products over them.

    Returns:
        The round in which held-out tokens keep most energy, with the experts' loads on these.
    """
    allowed_F = share_TF.new_ones(share_TF.shape[1], dtype=torch.bool) if allowed_F is None else allowed_F
    tokens = _Tokens.split(x_TD, share_TF, allowed_F)
    factored = FactoredRidge.of(tokens.x_TD, ridge)
    expert_T = first_clusters(tokens.share_TF, experts, seed, team)
    state = _sets(tokens, expert_T, None, experts, active)
    tried: list[tuple[_State, Tensor]] = []
    for _ in range(rounds):
        router_ED = factored.solve(tokens.x_TD.T @ energy_targets(_gains(tokens, state, team), "raw"))
        next_T = (tokens.x_TD @ router_ED.T).argmax(dim=1)
        state = _sets(tokens, next_T, router_ED, experts, active)
        tried.append((state, router_ED))
        if torch.equal(next_T, expert_T) or _best(tried)[0] is not state:
            break
        expert_T = next_T
    state, router_ED = _best(tried)
    for _ in range(REFINEMENTS if router_steps and experts > 1 else 0):
        with rounded_products(share_TF.dtype == torch.bfloat16):
            router_ED = refine_softmax(router_ED, tokens.x_TD, _gains(tokens, state, team), router_steps, seed)
        state = _sets(tokens, (tokens.x_TD @ router_ED.T).argmax(dim=1), router_ED, experts, active)
        tried.append((state, router_ED))
    found, router_ED = _best(tried)
    worth_EF = _over(found.mean_EF, found.price)
    return TokenClusters(torch.zeros_like(allowed_F), found.own_EF, router_ED, found.kept, found.load_E, worth_EF)


def _best(tried: Sequence[tuple[_State, Tensor]]) -> tuple[_State, Tensor]:
    """The round in which held-out tokens keep most, of equal ones the first."""
    return max(tried, key=lambda each: each[0].kept)


def _over(mean_EF: Tensor, price: float) -> Tensor:
    """Mean shares in units of the price, of the smallest share where neurons cost nothing; float16 has its best
    precision about 1. The largest shares must stay apart: a lower budget chooses among them."""
    positive_N = mean_EF[mean_EF > 0]
    unit = price or (float(positive_N.min()) if len(positive_N) else 1.0)
    return (mean_EF / max(unit, float(mean_EF.max()) / _LARGEST_WORTH)).half()


def _gains(tokens: _Tokens, state: _State, team: Team) -> Tensor:
    """What each expert would keep of each token's energy, less what its neurons cost, [T, E]."""
    return kept_energy(tokens.share_TF, state.own_EF, team) - state.price * state.own_EF.sum(dim=1)


def _sets(tokens: _Tokens, expert_T: Tensor, router_ED: Tensor | None, experts: int, active: int) -> _State:
    """The sets for the tokens of each expert, at the price that the loads of held-out tokens ask for.

    Before there is a router, the loads are those of the other tokens.
    """
    # One average token more: a cluster without tokens gets the static choice, a small one leans to it.
    count_E = torch.bincount(expert_T, minlength=experts)
    sum_EF = sums_by_expert(tokens.share_TF, expert_T, experts) + tokens.mean_F
    mean_EF = sum_EF / (count_E + 1)[:, None]
    held_H = None if router_ED is None else (tokens.held_x_HD @ router_ED.T).argmax(dim=1)
    load_E = count_E if held_H is None else torch.bincount(held_H, minlength=experts)
    price = lowest_price(mean_EF, load_E, active)
    own_EF = mean_EF > price
    share_E = load_E.double() / load_E.sum()
    if price == 0:  # neurons that no token of these woke cost nothing: other text may
        spare = max(0, math.floor(active - float(own_EF.sum(dim=1).double() @ share_E) + 1e-6))
        own_EF |= largest(mean_EF.masked_fill(own_EF | ~tokens.allowed_F, -1.0), spare) & tokens.allowed_F
    kept = 0.0
    if held_H is not None:
        kept = float(block_product(tokens.held_share_HF, own_EF).gather(1, held_H[:, None]).mean())
    return _State(mean_EF, own_EF, price, share_E, kept)
