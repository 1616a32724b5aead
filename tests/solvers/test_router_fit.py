"""Linear router fits: closed form, exact recovery, streaming, refinement, and the measures they are judged by.

Axes: T tokens, D input width, E experts, K chosen experts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.solvers import router_fit as rf

TOKENS, HELD, WIDTH, EXPERTS, K = 3000, 1000, 16, 6, 2


def problem(seed: int = 0, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Inputs x_TD with unequal coordinates, and the scores z_TE of a linear router."""
    generator = torch.Generator().manual_seed(seed)
    spread_D = torch.rand(WIDTH, generator=generator) * 3 + 0.2
    x_TD = torch.randn(tokens, WIDTH, generator=generator) * spread_D + 0.3
    weight_ED = torch.randn(EXPERTS, WIDTH, generator=generator)
    return x_TD, x_TD @ weight_ED.T


def batches(x_TD: Tensor, y_TE: Tensor, size: int = 512) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x_TD.split(size), y_TE.split(size), strict=True))


def held_score(x_TD: Tensor, set_TE: Tensor) -> rf.Score:
    return lambda weight_ED: rf.agreement(rf.top_k_sets(x_TD @ weight_ED.T, K), set_TE)


def fit_sets(x_TD: Tensor, set_TE: Tensor, steps: int) -> tuple[Tensor, Tensor, int]:
    """(ridge weights, refined weights, iterations) for sets, the last HELD tokens held out."""
    fit, held = slice(0, -HELD), slice(-HELD, None)
    score = held_score(x_TD[held], set_TE[held])
    statistics = rf.RidgeStatistics.collect(batches(x_TD[fit], rf.decision_targets(set_TE[fit])))
    ridge_ED, _, _ = rf.choose_ridge(statistics, (1e-4, 1e-2, 1.0), score)
    data = batches(x_TD[fit], rf.decision_margins(set_TE[fit]))
    refined_ED, step = rf.refine_logistic(ridge_ED, lambda: data, K, steps, score)
    return ridge_ED, refined_ED, step


def test_ridge_is_the_closed_form() -> None:
    x_TD, z_TE = problem()
    ridge = 0.05
    strength = ridge * float(x_TD.double().square().sum()) / WIDTH
    stacked = np.vstack([x_TD.double().numpy(), np.sqrt(strength) * np.eye(WIDTH)])
    target = np.vstack([z_TE.double().numpy(), np.zeros((WIDTH, EXPERTS))])
    expected_DE = np.linalg.lstsq(stacked, target, rcond=None)[0]
    got_ED = rf.fit_ridge(batches(x_TD, z_TE), ridge)
    assert got_ED.dtype == torch.float32
    np.testing.assert_allclose(got_ED.numpy(), expected_DE.T, rtol=2e-5, atol=2e-5)


def test_ridge_does_not_depend_on_the_batches() -> None:
    x_TD, z_TE = problem()
    whole_ED = rf.fit_ridge([(x_TD.double(), z_TE.double())], 1e-3)
    streamed_ED = rf.fit_ridge(batches(x_TD.double(), z_TE.double(), 7), 1e-3)
    torch.testing.assert_close(streamed_ED, whole_ED, rtol=1e-6, atol=1e-6)


def test_ridge_of_dead_inputs_is_zero_and_without_batches_an_error() -> None:
    assert not rf.fit_ridge([(torch.zeros(4, 3), torch.ones(4, 2))], 1.0).any()
    with pytest.raises(ValueError, match="batch"):
        rf.fit_ridge([], 1.0)


def test_decisions_of_a_linear_router_are_recovered() -> None:
    x_TD, z_TE = problem(tokens=8000)
    set_TE = rf.top_k_sets(z_TE, K)
    ridge_ED, refined_ED, step = fit_sets(x_TD, set_TE, steps=100)
    score = held_score(x_TD[-HELD:], set_TE[-HELD:])
    assert step > 0
    assert score(refined_ED) > 0.99
    assert score(refined_ED) >= score(ridge_ED)


def test_planted_clusters_are_routed_to_their_experts() -> None:
    generator = torch.Generator().manual_seed(1)
    centre_ED = torch.randn(EXPERTS, WIDTH, generator=generator) * 3
    label_T = torch.randint(EXPERTS, (TOKENS,), generator=generator)
    x_TD = centre_ED[label_T] + torch.randn(TOKENS, WIDTH, generator=generator)
    energy_TE = 0.1 * torch.rand(TOKENS, EXPERTS, generator=generator)
    energy_TE[torch.arange(TOKENS), label_T] += 1
    weight_ED = rf.fit_ridge(batches(x_TD[HELD:], rf.energy_targets(energy_TE[HELD:], "amplitude")), 1e-3)
    choice_T = (x_TD[:HELD] @ weight_ED.T).argmax(dim=1)
    assert (choice_T == label_T[:HELD]).float().mean() > 0.99


@given(seed=st.integers(0, 1000), noise=st.floats(0, 10))
@settings(max_examples=8, deadline=None)
def test_refinement_is_never_worse_on_held_out_tokens(seed: int, noise: float) -> None:
    x_TD, z_TE = problem(seed, tokens=2000)
    noisy_TE = z_TE + noise * torch.randn(z_TE.shape, generator=torch.Generator().manual_seed(seed))
    set_TE = rf.top_k_sets(noisy_TE, K)
    ridge_ED, refined_ED, step = fit_sets(x_TD, set_TE, steps=20)
    score = held_score(x_TD[-HELD:], set_TE[-HELD:])
    assert score(refined_ED) >= score(ridge_ED)
    assert step > 0 or torch.equal(refined_ED, ridge_ED)


def test_refinement_towards_energies_keeps_more_energy_than_the_ridge() -> None:
    x_TD, z_TE = problem(tokens=6000)
    energy_TE = z_TE.exp()
    fit, held = slice(0, -HELD), slice(-HELD, None)

    def score(weight_ED: Tensor) -> float:
        return rf.energy_kept(rf.top_k_sets(x_TD[held] @ weight_ED.T, K), energy_TE[held])

    ridge_ED = rf.fit_ridge(batches(x_TD[fit], rf.energy_targets(energy_TE[fit], "raw")), 1e-3)
    data = batches(x_TD[fit], rf.energy_margins(energy_TE[fit], K))
    refined_ED, _ = rf.refine_logistic(ridge_ED, lambda: data, K, 60, score)
    ceiling = rf.energy_kept(rf.top_k_sets(energy_TE[held], K), energy_TE[held])
    assert score(ridge_ED) < score(refined_ED) <= ceiling
    assert score(refined_ED) > 0.999 * ceiling


def test_fits_are_deterministic() -> None:
    x_TD, z_TE = problem()
    set_TE = rf.top_k_sets(z_TE, K)
    first, second = fit_sets(x_TD, set_TE, 20), fit_sets(x_TD, set_TE, 20)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_refinement_does_not_depend_on_the_batches() -> None:
    x_TD, z_TE = problem()
    margin_TE = rf.decision_margins(rf.top_k_sets(z_TE, K)).double()
    start_ED = rf.fit_ridge([(x_TD, margin_TE)], 1e-2).double()
    rounds = iter(range(100))
    refined = [
        rf.refine_logistic(
            start_ED, lambda size=size: batches(x_TD.double(), margin_TE, size), K, 10, lambda _: next(rounds)
        )
        for size in (TOKENS, 100)
    ]
    torch.testing.assert_close(refined[0][0], refined[1][0], rtol=1e-6, atol=1e-8)


def test_permuting_experts_permutes_the_router() -> None:
    x_TD, z_TE = problem()
    set_TE = rf.top_k_sets(z_TE, K)
    order_E = torch.tensor([3, 0, 5, 1, 4, 2])
    plain, permuted = fit_sets(x_TD, set_TE, 10), fit_sets(x_TD, set_TE[:, order_E], 10)
    torch.testing.assert_close(permuted[0], plain[0][order_E], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(permuted[1], plain[1][order_E], rtol=1e-2, atol=1e-2)


def test_loss_ignores_what_all_experts_share_and_weighs_by_the_margin() -> None:
    _, z_TE = problem(tokens=50)
    energy_TE = torch.rand(50, EXPERTS)
    margin_TE = rf.energy_margins(energy_TE, K)
    loss = rf.boundary_loss(z_TE, margin_TE, K)
    torch.testing.assert_close(rf.boundary_loss(z_TE + torch.randn(50, 1), margin_TE, K), loss)
    torch.testing.assert_close(rf.boundary_loss(z_TE, 3 * margin_TE, K), 3 * loss)
    assert torch.equal((margin_TE > 0).float(), rf.top_k_sets(energy_TE, K))
    assert rf.boundary_loss(100 * energy_TE, margin_TE, K) < rf.boundary_loss(-100 * energy_TE, margin_TE, K)


def test_measures() -> None:
    energy_TE = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 10.0]])
    oracle_TE = rf.top_k_sets(energy_TE, 2)
    assert oracle_TE.tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]  # of equal energies the lower index
    other_TE = rf.top_k_sets(torch.tensor([[0.0, 1.0, 1.0, 0.0]]).expand(2, -1), 2)
    assert rf.agreement(oracle_TE, oracle_TE) == 1
    assert rf.agreement(other_TE, oracle_TE) == 0.25
    assert rf.energy_kept(oracle_TE, energy_TE) == pytest.approx((0.7 + 1.0) / 2)
    assert rf.energy_kept(other_TE, energy_TE) == pytest.approx(0.25)
    assert rf.energy_kept(oracle_TE, torch.zeros(2, 4)) == 0


@pytest.mark.parametrize("form", ["share", "amplitude"])
def test_normalised_targets_give_every_token_the_same_say(form: str) -> None:
    energy_TE = torch.rand(20, EXPERTS)
    louder_TE = energy_TE * torch.logspace(0, 6, 20).unsqueeze(1)
    torch.testing.assert_close(rf.energy_targets(louder_TE, form), rf.energy_targets(energy_TE, form))
    assert not torch.allclose(rf.energy_targets(louder_TE, "raw"), rf.energy_targets(energy_TE, "raw"))


def test_the_best_ridge_wins_and_of_equal_ones_the_stronger() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(50, 6, generator=generator), torch.randn(50, 4, generator=generator)
    statistics, grid = rf.RidgeStatistics.collect([batch]), (1e-2, 1e-4, 1.0)
    assert rf.choose_ridge(statistics, grid, lambda weight_ED: float(weight_ED.norm()))[1] == 1e-4
    assert rf.choose_ridge(statistics, grid, lambda weight_ED: -float(weight_ED.norm()))[1] == 1.0
    assert rf.choose_ridge(statistics, grid, lambda _: 0.0)[1] == 1.0


def test_a_refinement_that_is_worth_less_is_not_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD, start_ED = torch.randn(50, 6, generator=generator), torch.randn(4, 6, generator=generator)
    margin_TE = rf.energy_margins(torch.rand(50, 4, generator=generator), 2)

    def worth(weight_ED: Tensor) -> float:
        return float(torch.equal(weight_ED, start_ED))

    made_ED, step = rf.refine_logistic(start_ED, lambda: [(x_TD, margin_TE)], 2, 20, worth)
    assert step == 0
    assert torch.equal(made_ED, start_ED)
