"""CMoE: the partition, its router and its exactness.

Axes: T tokens, D model width, F neurons, E experts, G planted groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.methods.cmoe.config import Config
from moesaic.methods.cmoe.method import plan_site, router_probabilities
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.reference import choose, reference_ffn, reference_scores
from moesaic.solvers.markers import atopk
from tests.ffns import random_ffn, random_inputs, relative_error

F32 = torch.float32


def plan_of(weights: FFNWeights, x_TD: Tensor, seed: int = 0, **options: Any) -> LayerPlan:
    return plan_site(weights, SiteInputs(x_TD), Config(**options), seed)


def labels_of(plan: LayerPlan) -> Tensor:
    """Expert of each neuron; -1 for the shared ones."""
    label_F = torch.full((plan.d_ff,), -1)
    for number, expert in enumerate(plan.experts):
        label_F[expert[expert >= 0]] = number
    return label_F


def adjusted_rand(a: Tensor, b: Tensor) -> float:
    """Adjusted Rand index of two labelings (Hubert and Arabie)."""

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    table.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)
    rows, columns, all_pairs = pairs(table.sum(1)), pairs(table.sum(0)), len(a) * (len(a) - 1) / 2
    expected = rows * columns / all_pairs
    return (pairs(table) - expected) / ((rows + columns) / 2 - expected)


def assert_same(a: LayerPlan, b: LayerPlan) -> None:
    assert torch.equal(a.packed, b.packed)
    assert torch.equal(a.selection_bias, b.selection_bias)  # type: ignore[arg-type]
    assert all(torch.equal(a.router.tensors[name], b.router.tensors[name]) for name in b.router.tensors)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (F32, 1e-5)])
@pytest.mark.parametrize(("gated", "biases"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("d_ff", [40, 37])
def test_all_experts_active_equals_dense(
    d_ff: int, gated: bool, biases: bool, dtype: torch.dtype, limit: float
) -> None:
    weights = random_ffn(d_ff, gated=gated, biases=biases, dtype=dtype)
    x_TD = random_inputs(40, dtype=dtype)
    plan = plan_of(weights, x_TD, layout="S2A6E8")
    assert relative_error(reference_ffn(weights, plan, x_TD), weights(x_TD)) < limit


def test_shared_neurons_have_the_highest_rates() -> None:
    weights, x_TD = random_ffn(40, dtype=F32), random_inputs(90, dtype=F32)
    plan = plan_of(weights, x_TD)
    counts = atopk(weights, [x_TD], 10).counts
    assert int(counts[plan.shared].min()) >= int(counts[labels_of(plan) >= 0].max())


def test_result_does_not_depend_on_seed_threads_or_precision() -> None:
    weights, x_TD = random_ffn(512, 64, dtype=F32), random_inputs(1200, 64, dtype=F32)
    first = plan_of(weights, x_TD, balance_steps=5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        others = [
            plan_of(weights, x_TD, seed=7, balance_steps=5),
            plan_of(weights, x_TD, balance_steps=5, compute_dtype="bfloat16"),
            plan_of(weights, x_TD, balance_steps=5, compute_dtype="float32"),
        ]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert_same(first, other)


@pytest.mark.parametrize("iterations", [1, 4])
def test_permuted_neurons_give_the_permuted_split(iterations: int) -> None:
    weights, x_TD, _ = planted()  # has one best assignment and different rates: no ties to break
    options = {"layout": "S1A1E5", "markers_per_token": 24, "iterations": iterations}
    plan = plan_of(weights, x_TD, **options)
    order_F = torch.randperm(weights.d_ff, generator=torch.Generator().manual_seed(3))
    permuted = plan_of(weights.take(order_F), x_TD, **options)
    assert torch.equal(labels_of(permuted), labels_of(plan)[order_F])
    assert torch.equal(permuted.router.tensors["up"], plan.router.tensors["up"])


def test_weights_of_the_chosen_are_exactly_one_and_bias_only_chooses() -> None:
    weights, x_TD = random_ffn(40, dtype=F32), random_inputs(60, dtype=F32)
    plan = plan_of(weights, x_TD)
    assert plan.selection_bias is not None
    assert plan.selection_bias.tolist() == [0.0] * 5
    forced = replace(plan, selection_bias=torch.tensor([2.0, 2.0, 0.0, 2.0, 0.0]))
    for x_D in x_TD:
        assert all(float(weight) == 1.0 for _, weight in choose(weights, plan, x_D))
        assert sorted(expert for expert, _ in choose(weights, forced, x_D)) == [0, 1, 3]
    # With s = 1 the weights are 1 + p: p must not contain the bias.
    trained = replace(forced, gate_scale=torch.ones(5))
    p_E = reference_scores(weights, plan, x_TD[0]).softmax(dim=0)
    for expert, weight in choose(weights, trained, x_TD[0]):
        assert float(weight) == pytest.approx(1 + float(p_E[expert]))


@pytest.mark.parametrize(("gated", "biases"), [(True, False), (True, True), (False, True)])
def test_router_scores_are_the_representatives_normalised_activations(gated: bool, biases: bool) -> None:
    weights, x_TD = random_ffn(40, gated=gated, biases=biases, dtype=F32), random_inputs(60, dtype=F32) * 5
    plan = plan_of(weights, x_TD)

    def unit_scores(neuron: int) -> Tensor:
        one = weights.take(torch.tensor([neuron]))
        scale_up = 1 / one.up_FD.norm()
        pre = x_TD @ one.up_FD[0] + (0 if one.up_bias_F is None else one.up_bias_F)
        if one.gate_FD is None:
            return torch.nn.functional.silu(pre * scale_up).abs()
        gate = x_TD @ one.gate_FD[0] + (0 if one.gate_bias_F is None else one.gate_bias_F)
        return (torch.nn.functional.silu(gate / one.gate_FD.norm()) * pre * scale_up).abs()

    for number, expert in enumerate(plan.experts):
        scores_T = torch.stack([reference_scores(weights, plan, x_D)[number] for x_D in x_TD])
        members = [int(neuron) for neuron in expert if neuron >= 0]
        assert sum(torch.allclose(scores_T, unit_scores(neuron), rtol=1e-4, atol=1e-6) for neuron in members) == 1
    prob_TE = router_probabilities(plan.router, x_TD, weights)
    expected = torch.stack([reference_scores(weights, plan, x_D).softmax(dim=0) for x_D in x_TD])
    assert torch.allclose(prob_TE.float(), expected, atol=1e-5)


def test_representative_is_the_member_nearest_to_the_mean_column() -> None:
    weights, x_TD = random_ffn(64, dtype=F32), random_inputs(200, dtype=F32)
    plan = plan_of(weights, x_TD)
    columns_FT = torch.zeros(200, 64).scatter_(1, atopk(weights, [x_TD], 10).idx_TK, 1.0).T.double()
    unit_FD = weights.up_FD / weights.up_FD.norm(dim=1, keepdim=True)
    for number, expert in enumerate(plan.experts):
        distance_M = (columns_FT[expert] - columns_FT[expert].mean(dim=0)).abs().sum(dim=1)
        nearest = expert[distance_M <= distance_M.min() + 1e-9][0]
        assert torch.allclose(plan.router.tensors["up"][number], unit_FD[nearest])


def planted() -> tuple[FFNWeights, Tensor, Tensor]:
    """One block of 16 neurons that fires for all tokens and four that fire each for its own tokens, in mixed order.

    Every block has its own 6 input coordinates; its first neuron reads their sum and fires most, the others read
    equally tilted sums. Returns the FFN, inputs of groups of slightly different sizes, each neuron's block (0: all).
    """
    generator = torch.Generator().manual_seed(0)
    blocks, wide, size = 5, 6, 16
    rows_FD = torch.zeros(blocks * size, blocks * wide)
    for block in range(blocks):
        tilt = torch.randn(size, wide, generator=generator)
        tilt -= tilt.mean(dim=1, keepdim=True)
        tilt *= 1.5 / tilt.norm(dim=1, keepdim=True)
        tilt[0] = 0
        rows_FD[block * size : (block + 1) * size, block * wide : (block + 1) * wide] = 1 + tilt
    group_T = torch.repeat_interleave(torch.arange(1, blocks), torch.tensor([303, 300, 297, 293]))
    x_TD = torch.randn(len(group_T), blocks * wide, generator=generator) * 0.01
    fires_TD = torch.arange(blocks)[None].eq(group_T[:, None]).repeat_interleave(wide, dim=1)
    fires_TD[:, :wide] = True
    x_TD += fires_TD * (1 + 0.4 * torch.randn(x_TD.shape, generator=generator))
    order_F = torch.randperm(blocks * size, generator=generator)
    weights = FFNWeights(rows_FD, torch.randn(30, 80, generator=generator), "silu", rows_FD.clone())
    shuffle_T = torch.randperm(len(group_T), generator=generator)
    return weights.take(order_F), x_TD[shuffle_T] * 3, torch.arange(blocks).repeat_interleave(size)[order_F]


@pytest.mark.parametrize("iterations", [1, 5])
def test_planted_blocks_are_recovered_and_found_by_the_router(iterations: int) -> None:
    weights, x_TD, block_F = planted()
    plan = plan_of(weights, x_TD, layout="S1A1E5", markers_per_token=24, iterations=iterations)
    assert adjusted_rand(labels_of(plan) + 1, block_F) > 0.95
    group_T = weights.up_FD.new_tensor([float(x_D.view(5, 6)[1:].sum(dim=1).argmax()) for x_D in x_TD]) + 1
    block_E = torch.stack([block_F[expert].mode().values for expert in plan.experts])
    chosen_T = torch.tensor([choose(weights, plan, x_D)[0][0] for x_D in x_TD])
    assert (block_E[chosen_T] == group_T).float().mean() > 0.95


def test_more_iterations_move_neurons_until_settled() -> None:
    weights, x_TD, block_F = planted()
    # Without a shared part all first centroids lie in the block that fires for all tokens: a bad start.
    one, many, more = (
        plan_of(weights, x_TD, layout="S0A1E5", markers_per_token=24, iterations=count) for count in (1, 40, 41)
    )
    assert adjusted_rand(labels_of(one), block_F) < 0.7
    assert adjusted_rand(labels_of(many), block_F) > 0.95
    assert_same(many, more)


def test_balance_steps_even_out_the_load_and_leave_weights_alone() -> None:
    weights, x_TD = random_ffn(64, dtype=F32), random_inputs(3000, dtype=F32) + 1
    plain = plan_of(weights, x_TD, layout="S3A1E8")
    balanced = plan_of(weights, x_TD, layout="S3A1E8", balance_steps=300)

    def largest_load(plan: LayerPlan) -> float:
        assert plan.selection_bias is not None
        p_TE = router_probabilities(plan.router, x_TD, weights).float()
        return float(torch.bincount((p_TE + plan.selection_bias).argmax(dim=1), minlength=5).max()) / len(x_TD)

    assert largest_load(plain) > 0.3
    assert largest_load(balanced) < 0.22
    assert torch.equal(plain.packed, balanced.packed)
    assert balanced.gate_scale is not None
    assert not balanced.gate_scale.any()


@pytest.mark.parametrize("x_TD", [random_inputs(1, dtype=F32), torch.zeros(3, 16)], ids=["one token", "zeros"])
def test_hardly_any_calibration_still_gives_a_fixed_partition(x_TD: Tensor) -> None:
    weights = random_ffn(100, dtype=F32)
    first = plan_of(weights, x_TD, iterations=3)
    assert first.is_partition
    assert_same(first, plan_of(weights, x_TD.clone(), iterations=3))


def test_low_precision_checkpoints_and_inputs_are_read() -> None:
    weights = random_ffn(40, biases=True, dtype=torch.bfloat16)
    plan = plan_of(weights, random_inputs(50, dtype=torch.bfloat16))
    assert plan.is_partition
    assert {tensor.dtype for tensor in plan.router.tensors.values()} == {F32}
    assert sorted(plan.router.tensors) == ["gate", "gate_bias", "up", "up_bias"]


def test_everything_shared_needs_no_text() -> None:
    config = Config(layout="S4A0E4")
    assert not config.needs_calibration()
    assert Config().needs_calibration()
    plan = plan_site(random_ffn(37), None, config, 0)
    assert plan.shared.tolist() == list(range(37))
    assert plan.experts == ()


def test_bad_input_is_refused_by_name() -> None:
    weights, x_TD = random_ffn(37, dtype=F32), random_inputs(dtype=F32)
    with pytest.raises(InputError, match="NaN or Inf"):
        plan_of(weights, x_TD / 0)
    with pytest.raises(InputError, match="markers_per_token 40 is more than the FFN's 37"):
        Config(markers_per_token=40).check(37)
    with pytest.raises(InputError, match="top-k 6 is larger"):
        Config(layout="S3A6E8")
