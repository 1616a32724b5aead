from __future__ import annotations

import torch

from moesaic.solvers.balance import balance_bias, expert_load, update_balance_bias


def test_update_lowers_the_loaded_and_raises_the_idle() -> None:
    bias_E = torch.tensor([0.5, 0.0, -0.5, 0.0])
    updated = update_balance_bias(bias_E, torch.tensor([10, 0, 3, 7]), 0.25)
    assert updated.tolist() == [0.25, 0.25, -0.25, -0.25]
    assert bias_E.tolist() == [0.5, 0.0, -0.5, 0.0]


def test_equal_loads_change_nothing() -> None:
    bias_E = torch.tensor([0.5, -0.5, 0.25])
    assert torch.equal(update_balance_bias(bias_E, torch.tensor([7, 7, 7]), 0.1), bias_E)


def test_load_counts_the_chosen_and_ties_go_to_the_lowest() -> None:
    prob_TE = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.3, 0.5], [0.1, 0.1, 0.1]])
    assert expert_load(prob_TE, torch.zeros(3), 1).tolist() == [2, 0, 1]
    assert expert_load(prob_TE, torch.zeros(3), 2).tolist() == [2, 3, 1]
    assert expert_load(prob_TE, torch.tensor([0.0, 1.0, 0.0]), 1).tolist() == [0, 3, 0]


def test_many_updates_even_out_a_skewed_router() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(2000, 5, generator=generator) * 0.3 + torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0])
    prob_TE = logits_TE.double().softmax(dim=1)
    before = expert_load(prob_TE, torch.zeros(5), 2)
    bias_E = balance_bias(prob_TE, 2, steps=400, step=1e-3, batch=500)
    after = expert_load(prob_TE, bias_E, 2)
    assert before.min() < 0.1 * before.double().mean()
    assert after.max() < 1.1 * after.double().mean()
    assert after.sum() == before.sum() == 4000


def test_batches_start_over_at_the_end() -> None:
    prob_TE = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # batch 0 loads expert 0, batch 1 loads expert 1
    assert balance_bias(prob_TE, 1, steps=0, step=0.125, batch=1).tolist() == [0.0, 0.0]
    assert balance_bias(prob_TE, 1, steps=1, step=0.125, batch=1).tolist() == [-0.125, 0.125]
    # Steps shrink: 0.25 down, then 0.125 back; or 0.375, 0.25 back and 0.125 down again.
    assert balance_bias(prob_TE, 1, steps=2, step=0.25, batch=1).tolist() == [-0.125, 0.125]
    assert balance_bias(prob_TE, 1, steps=3, step=0.375, batch=1).tolist() == [-0.25, 0.25]


def test_nearly_uniform_probabilities_are_balanced_by_a_coarse_step() -> None:
    prob_TE = 0.5 + 1e-5 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prob_TE[:, 0] += 1e-5
    assert expert_load(prob_TE, torch.zeros(2), 1)[0] > 700
    bias_E = balance_bias(prob_TE, 1, steps=500, step=1e-3, batch=500)
    assert abs(int(expert_load(prob_TE, bias_E, 1)[0]) - 500) < 100
