"""Experts for token groups: neuron choice, alternation with the router, predicted patterns.

Axes: T tokens, D model width, F neurons, E experts, G planted groups.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.solvers import token_clusters as tc
from moesaic.solvers.router_fit import RidgeStatistics

GROUPS, OWN, COMMON, WIDTH = 4, 5, 3, 8


def planted(tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """(x_TD, h_TF, group_T): tokens of a group use their OWN neurons and the COMMON last ones; x tells the group."""
    generator = torch.Generator().manual_seed(0)
    group_T = torch.arange(tokens) % GROUPS
    x_TD = torch.randn(tokens, WIDTH, generator=generator) * 0.1
    x_TD[torch.arange(tokens), group_T] += 1
    h_TF = torch.zeros(tokens, GROUPS * OWN + COMMON)
    for group in range(GROUPS):
        h_TF[group_T == group, group * OWN : (group + 1) * OWN] = 1
    h_TF[:, -COMMON:] = 1
    return x_TD, h_TF * torch.logspace(-2, 2, tokens).unsqueeze(1), group_T


def clusters_of(seed: int = 0, experts: int = GROUPS, rounds: int = 10, shared: int = COMMON) -> tc.TokenClusters:
    x_TD, h_TF, _ = planted()
    share_TF = tc.neuron_shares(h_TF, torch.ones(h_TF.shape[1]))
    sizes = (shared, OWN + COMMON - shared)
    return tc.cluster_tokens(x_TD, share_TF, experts, sizes, rounds=rounds, ridge=1e-2, seed=seed)


def test_first_clusters_are_no_ones_of_first_tokens() -> None:
    # Of 16 times as many tokens as a sample has, every 16th is the first of its window, and all of these are alike.
    generator = torch.Generator().manual_seed(0)
    h_TF = torch.rand(16 * 4096, GROUPS * OWN, generator=generator)
    h_TF[::16] = torch.arange(GROUPS * OWN).float()
    counts_E = tc.first_clusters(tc.neuron_shares(h_TF, torch.ones(GROUPS * OWN)), 8, 0).bincount(minlength=8)
    assert int(counts_E.max()) < len(h_TF) / 2


def test_energy_shares_do_not_depend_on_the_size_of_a_token() -> None:
    h_TF = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    norm_F = torch.arange(1.0, 10)
    share_TF = tc.neuron_shares(h_TF, norm_F)
    torch.testing.assert_close(share_TF.sum(dim=1), torch.ones(6))
    torch.testing.assert_close(tc.neuron_shares(h_TF * 1e3, norm_F), share_TF)
    torch.testing.assert_close(share_TF[0, 3] / share_TF[0, 1], (h_TF[0, 3] * 4 / (h_TF[0, 1] * 2)).square())
    assert tc.neuron_shares(h_TF * 0, norm_F).tolist() == torch.zeros(6, 9).tolist()


@given(st.integers(1, 6), st.integers(0, 10), st.integers(0, 10), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_chosen_neurons_are_as_many_as_asked_and_the_best(experts: int, shared: int, own: int, seed: int) -> None:
    score_EF = torch.rand(experts, 20, generator=torch.Generator().manual_seed(seed))
    shared_F, own_EF = tc.choose_neurons(score_EF, shared, own)
    assert int(shared_F.sum()) == shared
    assert own_EF.sum(dim=1).tolist() == [own] * experts
    assert not (own_EF & shared_F).any()
    for score_F, own_F in zip(score_EF, own_EF, strict=True):
        left_F = score_F[~own_F & ~shared_F]
        assert not own or not len(left_F) or float(score_F[own_F].min()) >= float(left_F.max())
    if shared == 0:
        assert torch.equal(own_EF, tc.largest(score_EF, own))


def test_neurons_that_all_experts_want_are_shared() -> None:
    score_EF = torch.tensor([[9.0, 1, 5, 0, 0], [0, 1, 5, 9, 0], [0, 9, 5, 0, 0]])
    shared_F, own_EF = tc.choose_neurons(score_EF, 1, 1)
    assert shared_F.tolist() == [False, False, True, False, False]
    assert own_EF.nonzero()[:, 1].tolist() == [0, 3, 1]


@pytest.mark.parametrize("shared", [0, COMMON])
def test_planted_groups_are_found_and_routed(shared: int) -> None:
    # twice as many experts as groups, so that no random start misses one
    x_TD, _, group_T = planted()
    found = clusters_of(experts=2 * GROUPS, shared=shared)
    assert found.kept == pytest.approx(1.0, abs=1e-5)
    expert_T = (x_TD @ found.router_ED.T).argmax(dim=1)
    used_TF = (found.own_EF | found.shared_F)[expert_T]
    for group in range(GROUPS):
        assert used_TF[group_T == group][:, group * OWN : (group + 1) * OWN].all()
    assert used_TF[:, -COMMON:].all()


def test_more_rounds_never_keep_less() -> None:
    kept = [clusters_of(experts=3, rounds=rounds, seed=3).kept for rounds in (1, 2, 5, 10)]
    assert kept == sorted(kept)


def test_refined_routers_keep_more_energy_also_of_other_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(3000, 16, generator=generator)
    gate_FD, up_FD = (torch.randn(48, 16, generator=generator) for _ in range(2))
    share_TF = tc.neuron_shares(torch.relu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T), torch.ones(48))

    def kept(router_steps: int) -> tuple[float, float]:
        fit = (x_TD[:2000], share_TF[:2000])
        found = tc.cluster_tokens(*fit, 8, (0, 24), rounds=5, ridge=1e-2, seed=0, router_steps=router_steps)
        chosen_EF = found.own_EF[(x_TD[2000:] @ found.router_ED.T).argmax(dim=1)]
        return found.kept, float((share_TF[2000:] * chosen_EF).sum(dim=1).mean())

    (before, before_other), (after, after_other) = kept(0), kept(50)
    assert after > before + 0.005
    assert after_other > before_other + 0.002


def test_same_seed_same_clusters() -> None:
    one, two = clusters_of(seed=5), clusters_of(seed=5)
    assert torch.equal(one.router_ED, two.router_ED)
    assert torch.equal(one.own_EF, two.own_EF)


def test_fewer_tokens_than_experts_and_silence() -> None:
    x_TD, h_TF, _ = planted(8)
    for h_tF in (h_TF[:1], h_TF[:3] * 0):
        share_TF = tc.neuron_shares(h_tF, torch.ones(h_TF.shape[1]))
        found = tc.cluster_tokens(x_TD[: len(h_tF)], share_TF, 6, (2, 4), rounds=3, ridge=1e-2, seed=0)
        assert found.own_EF.sum(dim=1).tolist() == [4] * 6
        assert torch.isfinite(found.router_ED).all()


def test_pattern_products_are_those_of_the_predictions() -> None:
    x_TD, h_TF, _ = planted()
    share_TF = tc.neuron_shares(h_TF, torch.ones(h_TF.shape[1]))
    rows_FD = tc.predicted_patterns(x_TD, share_TF, 1e-3)
    predicted_TF = x_TD @ RidgeStatistics.collect([(x_TD, share_TF.sqrt())]).solve(1e-3).T
    expected_FF = predicted_TF.T @ predicted_TF / len(x_TD)
    torch.testing.assert_close(rows_FD @ rows_FD.T, expected_FF, rtol=1e-2, atol=1e-4)


def test_a_refinement_that_keeps_less_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, h_TF, _ = planted()
    share_TF = tc.neuron_shares(h_TF, torch.ones(h_TF.shape[1]))

    def kept(steps: int) -> float:
        sizes = (COMMON, OWN)
        return tc.cluster_tokens(x_TD, share_TF, GROUPS, sizes, rounds=10, ridge=1e-2, seed=0, router_steps=steps).kept

    monkeypatch.setattr(tc, "refine_softmax", lambda router_ED, *_: torch.zeros_like(router_ED))
    assert kept(5) == kept(0)
