"""Experts of different widths: the price, who sets it, and what planted groups of unequal need get.

Axes: T tokens, D model width, F neurons, E experts, G planted groups.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.solvers.free_widths import cluster_tokens_freely, held_out, lowest_price
from moesaic.solvers.token_clusters import TokenClusters, cluster_tokens, neuron_shares

NEEDS = (2, 6, 16)  # neurons that the tokens of a group use
WIDTH = 8


def planted(tokens: int = 6000) -> tuple[Tensor, Tensor, Tensor]:
    """(x_TD, share_TF, group_T): tokens of a group use as many neurons as NEEDS says, all alike; x tells the group."""
    generator = torch.Generator().manual_seed(0)
    group_T = torch.randint(len(NEEDS), (tokens,), generator=generator)
    x_TD = torch.randn(tokens, WIDTH, generator=generator) * 0.1
    x_TD[torch.arange(tokens), group_T] += 1
    h_TF = 0.05 * torch.rand(tokens, sum(NEEDS), generator=generator)
    for group, neurons in enumerate(torch.arange(sum(NEEDS)).split(NEEDS)):
        h_TF[torch.nonzero(group_T == group), neurons] = 1
    return x_TD, neuron_shares(h_TF, torch.ones(sum(NEEDS))), group_T


def clusters_of(active: int, tokens: int = 6000, steps: int = 0, experts: int = len(NEEDS)) -> TokenClusters:
    x_TD, share_TF, _ = planted(tokens)
    return cluster_tokens_freely(x_TD, share_TF, experts, active, rounds=10, ridge=1e-2, seed=0, router_steps=steps)


@given(
    st.integers(1, 6), st.integers(1, 12), st.floats(0.5, 12.0), st.sampled_from([1.0, 1e-4, 0.0]), st.integers(0, 99)
)
@settings(max_examples=120, deadline=None)
def test_the_price_is_the_lowest_that_fits(experts: int, neurons: int, active: float, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean_EF = 1 - spread * torch.rand(experts, neurons, generator=generator)  # near values differ in their last bits
    count_E = torch.randint(1, 50, (experts,), generator=generator)

    def used(limit: float) -> float:
        return float(((mean_EF > limit).sum(dim=1) * count_E).sum() / count_E.sum())

    limit = lowest_price(mean_EF, count_E, active)
    assert used(limit) <= active
    if limit > 0:
        assert used(float(torch.tensor(limit).nextafter(torch.tensor(0.0)))) > active


def test_neurons_of_experts_without_tokens_cost_nothing() -> None:
    mean_EF = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.7, 0.2]])
    assert lowest_price(mean_EF, torch.tensor([5, 0]), 1.0) == pytest.approx(0.5)


def test_a_zero_may_have_a_sign() -> None:
    assert lowest_price(torch.tensor([[-0.0, 0.5, 0.25]]), torch.tensor([3]), 1.0) == 0.25


def test_an_eighth_of_the_tokens_from_all_over_the_text_sets_the_price() -> None:
    held_T = held_out(16384)
    assert float(held_T.float().mean()) == 0.125
    for window in (512, 1024, 2048):  # every position of a window takes its turn
        assert held_T.view(-1, window).any(dim=0).all()
    assert not held_out(15).any()
    assert int(held_out(16).sum()) == 2


@pytest.mark.parametrize("steps", [0, 20])
def test_groups_get_the_neurons_that_they_need(steps: int) -> None:
    x_TD, _, group_T = planted()
    found = clusters_of(active=9, steps=steps, experts=6)  # one more than they need in the mean
    expert_T = (x_TD @ found.router_ED.T).argmax(dim=1)
    widths = []
    for group, neurons in enumerate(torch.arange(sum(NEEDS)).split(NEEDS)):
        own_NF = found.own_EF[expert_T[group_T == group]]
        assert own_NF[:, neurons].all()
        widths.append(float(own_NF.sum(dim=1).float().mean()))
    assert all(need <= width <= need + 3 for need, width in zip(NEEDS, widths, strict=True))


def test_held_out_tokens_use_what_was_asked_and_keep_more_than_with_equal_widths() -> None:
    x_TD, share_TF, _ = planted()
    active = 5  # fewer than the groups need in the mean
    free = clusters_of(active, experts=6)
    equal = cluster_tokens(x_TD, share_TF, 6, (0, active), rounds=10, ridge=1e-2, seed=0)
    assert free.load_E is not None
    assert float(free.load_E.sum()) == pytest.approx(1.0)
    held_T = held_out(len(x_TD))
    expert_H = (x_TD[held_T] @ free.router_ED.T).argmax(dim=1)
    assert float(free.own_EF.sum(dim=1)[expert_H].float().mean()) <= active
    assert float(free.own_EF.sum(dim=1).double() @ free.load_E) > active - 2
    assert free.kept > equal.kept + 0.02


def test_a_budget_for_all_neurons_gives_all() -> None:
    found = clusters_of(active=sum(NEEDS))
    assert found.own_EF.all()
    assert found.kept == pytest.approx(1.0, abs=1e-5)


def test_neurons_that_no_token_woke_fill_what_the_budget_leaves() -> None:
    x_TD, share_TF, _ = planted()
    share_TF = torch.cat([share_TF, torch.zeros(len(x_TD), 10)], dim=1)
    allowed_F = torch.ones(34, dtype=torch.bool)
    allowed_F[24:28] = False
    options = {"rounds": 3, "ridge": 1e-2, "seed": 0, "allowed_F": allowed_F}
    found = cluster_tokens_freely(x_TD, share_TF, 3, 27, **options)
    assert found.own_EF.sum(dim=1).tolist() == [27] * 3  # the 24 that wake, and 3 more
    assert not found.own_EF[:, 24:28].any()
    silent = cluster_tokens_freely(x_TD, share_TF * 0, 3, 5, **options)
    assert silent.own_EF.sum(dim=1).tolist() == [5] * 3


def test_the_same_tokens_and_seed_give_the_same_experts() -> None:
    one, two = (clusters_of(active=6, tokens=500, steps=5) for _ in range(2))
    assert torch.equal(one.own_EF, two.own_EF)
    assert torch.equal(one.router_ED, two.router_ED)


def test_more_experts_than_tokens_keep_the_budget() -> None:
    found = clusters_of(active=6, tokens=20, experts=30)
    assert found.load_E is not None
    assert float(found.own_EF.sum(dim=1).double() @ found.load_E) <= 6
    assert torch.isfinite(found.router_ED).all()
