"""Overlapping experts stored once: what they compute, how they are ordered, what survives of the dense weights.

Axes: T tokens, D model width, F neurons, E experts, U neurons of the union, K chosen experts.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.blueprint.model import Blueprint
from moesaic.errors import InputError
from moesaic.materialise.apply import build_ffn
from moesaic.materialise.pack import pack, site_spec, unpack
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.moesaic_ffn import use_path
from moesaic.nn.moesaic_union import UnionFeedForward, build_feed_forward
from moesaic.nn.reference import choose, reference_ffn
from moesaic.targets.parts import cut
from tests.ffns import random_ffn, random_inputs, relative_error
from tests.nn.plans import as_union, plan_of, random_members, unpadded
from tests.nn.test_paths import routed_paths

PATHS = routed_paths("union")


def test_a_forward_in_inference_mode_does_not_hinder_training() -> None:
    weights = random_ffn(24, 16)
    ffn = build_ffn(weights, as_union(plan_of(random_members(2, 24, 0.6))))
    x_TD = random_inputs(200, 16)
    with torch.inference_mode():
        ffn(x_TD[:3])
    for parameter in ffn.parameters():
        parameter.requires_grad_(True)
    ffn(x_TD).sum().backward()
    assert ffn.up_proj.weight.grad is not None


@st.composite
def cases(draw: st.DrawFn) -> tuple[FFNWeights, LayerPlan]:
    """Experts of any width from 0 to F, disjoint or overlapping, with and without shared neurons."""
    d_ff, experts = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    rows = [draw(st.sampled_from(["none", "one", "all", "some"])) for _ in range(experts)]
    some_EF = random_members(experts, d_ff, 0.5, draw(st.integers(0, 99)))
    one_F = F.one_hot(torch.tensor(draw(st.integers(0, d_ff - 1))), d_ff).bool()
    table = {"none": torch.zeros(d_ff).bool(), "all": torch.ones(d_ff).bool(), "one": one_F}
    member_EF = torch.stack([table.get(row, some_F) for row, some_F in zip(rows, some_EF, strict=True)])
    shared = torch.arange(draw(st.integers(0, d_ff)))
    plan = plan_of(member_EF, shared, draw(st.integers(1, experts)), gate=draw(st.sampled_from(["uniform", "sigmoid"])))
    return random_ffn(d_ff, gated=draw(st.booleans()), biases=draw(st.booleans())), plan


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([1, 3, 20]), st.sampled_from([as_union, unpadded]))
def test_a_union_computes_what_copies_compute(
    case: tuple[FFNWeights, LayerPlan], tokens: int, stored: Callable[[LayerPlan], LayerPlan]
) -> None:
    weights, plan = case
    module, x_TD = build_ffn(weights, stored(plan)), random_inputs(tokens)
    assert isinstance(module, UnionFeedForward)
    expected_TD = reference_ffn(weights, plan, x_TD)
    scale = expected_TD.abs().max().clamp(min=1.0)
    for path in PATHS:
        with use_path(module, path):
            with torch.no_grad():
                assert (module(x_TD) - expected_TD).abs().max() <= 1e-6 * scale
            assert (module(x_TD) - expected_TD).abs().max() <= 1e-6 * scale  # with gradients: other operations
    module.all_experts_on = True
    expected_TD = reference_ffn(weights, plan, x_TD, all_experts_on=True)
    assert (module(x_TD) - expected_TD).abs().max() <= 1e-6 * expected_TD.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("neurons", [64, 3000])  # the second has gaps that are worth jumping over
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 7, 80, 520])  # 520: each expert its own tokens
def test_the_default_path_equals_the_packed_form(neurons: int, dtype: torch.dtype, tokens: int) -> None:
    weights = random_ffn(neurons, dtype=dtype)
    member_EF = random_members(8, neurons, 0.4)
    member_EF[0, 1:] = False
    plan = plan_of(member_EF, torch.arange(neurons - 9, neurons), 2)
    x_TD = random_inputs(tokens, dtype=dtype)
    with torch.no_grad():
        packed_TD, union_TD = (build_ffn(weights, each)(x_TD) for each in (plan, as_union(plan)))
    assert relative_error(union_TD, packed_TD) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_every_token_to_one_expert_or_none_to_another() -> None:
    weights, x_TD = random_ffn(37), random_inputs(30)
    plan = plan_of(random_members(4, 37, 0.5))
    rows_ED = torch.zeros(4, 16)
    plan = dataclasses.replace(plan, router=Router("linear", {"weight": rows_ED, "bias": torch.tensor([0, 0, 1.0, 0])}))
    with torch.no_grad():
        y_TD = build_ffn(weights, as_union(plan))(x_TD)
    assert relative_error(y_TD, weights.take(plan.experts[2][plan.experts[2] >= 0])(x_TD)) < 1e-12


def test_gradients_are_those_of_the_packed_form() -> None:
    weights, x_TD = random_ffn(37), random_inputs(30)
    plan = plan_of(random_members(4, 37, 0.5), top_k=2)
    packed, union = build_ffn(weights, plan), build_ffn(weights, as_union(plan))
    for path in PATHS:
        gradients = []
        for module in (packed, union):
            module.requires_grad_(True).zero_grad()
            with use_path(module, path):
                module(x_TD).square().sum().backward()
            gradients.append(module.up_proj.weight.grad)
        dense = torch.zeros(37, 16, dtype=torch.float64)
        dense.index_add_(0, plan.packed.clamp(min=0), gradients[0] * (plan.packed >= 0)[:, None])
        assert relative_error(gradients[1], dense[as_union(plan).packed]) < 1e-9


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_union_is_the_or_of_the_experts_and_keeps_every_weight(case: tuple[FFNWeights, LayerPlan]) -> None:
    weights, plan = case
    union = as_union(plan)
    in_any = sorted({f for expert in plan.experts for f in expert.tolist() if f >= 0})
    assert sorted(union.union_neurons.tolist()) == in_any
    for row_U, expert in zip(union.membership, plan.experts, strict=True):
        assert set(union.union_neurons[row_U].tolist()) == {f for f in expert.tolist() if f >= 0}
    tensors = pack(weights, union)
    assert torch.equal(tensors["up_proj.weight"], weights.up_FD[union.packed])
    assert torch.equal(tensors["down_proj.weight"], weights.down_DF[:, union.packed])
    assert len(union.packed) == len(plan.shared) + len(in_any)
    module = build_feed_forward(json.loads(json.dumps(site_spec(weights, union))), 16, weights.activation)
    assert {name: t.shape for name, t in module.state_dict().items()} == {name: t.shape for name, t in tensors.items()}


def runs(row_U: Tensor) -> int:
    return sum(1 for on, _ in itertools.groupby(row_U.tolist()) if on)


def test_a_core_and_nested_or_few_sets_are_few_runs() -> None:
    core_EF = torch.zeros(3, 60, dtype=torch.bool)
    core_EF[:, ::3] = True  # twenty neurons that all have, scattered
    for e in range(3):
        core_EF[e, 1 + e * 15 :: 7] = True
    union = as_union(plan_of(core_EF))
    assert union.membership[:, :20].all()
    assert not union.membership[:, 20:].all(0).any()
    assert all(runs(row_U) <= 3 for row_U in union.membership)
    # All 2^E sets: a Gray code changes one owner per step; only where the empty set would stand it is two.
    sets = torch.tensor(list(itertools.product([False, True], repeat=6))).T
    shuffled = sets[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    union = as_union(plan_of(shuffled))
    changes = (union.membership[:, 1:] != union.membership[:, :-1]).sum(0)
    assert sorted(changes.tolist()) == [1] * 61 + [2]


def test_disjoint_experts_as_a_union_can_be_undone() -> None:
    weights = random_ffn(37, biases=True)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    member_EF = torch.zeros(3, 37, dtype=torch.bool)
    for e in range(3):
        member_EF[e, order[7 + 10 * e : 17 + 10 * e]] = True
    plan = as_union(plan_of(member_EF, order[:7]))
    assert plan.is_partition
    overlapping = member_EF.clone()
    overlapping[0] = overlapping.any(0)
    for each in (plan, as_union(plan_of(overlapping, order[:7]))):
        assert each.keeps_all
        back = unpack(pack(weights, each), each, weights.activation)
        assert all(torch.equal(back.tensors()[name], tensor) for name, tensor in weights.tensors().items())
    assert not as_union(plan_of(overlapping, order[:7])).is_partition


def test_native_targets_get_copies() -> None:
    weights = random_ffn(37)
    plan = as_union(plan_of(random_members(4, 37, 0.5), torch.arange(5)))
    shared, experts = cut(pack(weights, plan), plan)
    x_TD = random_inputs()
    for branch, index in zip([shared, *experts], [plan.shared, *plan.experts], strict=True):
        own = FFNWeights(branch.up_MD, branch.down_DM, "silu", branch.gate_MD)
        assert relative_error(own(x_TD), weights.take(index[index >= 0])(x_TD)) < 1e-12


def test_saved_and_loaded_modules_copies_and_other_tables(tmp_path: Path) -> None:
    weights, x_TD = random_ffn(37), random_inputs(30)
    first, second = (as_union(plan_of(random_members(4, 37, 0.9, seed))) for seed in (0, 1))
    module = build_ffn(weights, first)
    with torch.no_grad():
        expected_TD = module(x_TD)
        assert torch.equal(copy.deepcopy(module)(x_TD), expected_TD)
        save_file(module.state_dict(), tmp_path / "ffn.safetensors")
        again = build_feed_forward(site_spec(weights, first), 16, "silu").double()
        again.load_state_dict(load_file(tmp_path / "ffn.safetensors"))
        assert again.membership.dtype == torch.bool
        assert torch.equal(again(x_TD), expected_TD)
        if len(first.packed) == len(second.packed):  # the same module with another table
            again.load_state_dict(pack(weights, second))
            assert relative_error(again(x_TD), reference_ffn(weights, second, x_TD)) < 1e-6


def test_a_union_compiles_into_one_graph() -> None:
    weights = random_ffn(37, dtype=torch.float32)
    module, x_TD = build_ffn(weights, as_union(plan_of(random_members(4, 37, 0.5)))), random_inputs(dtype=torch.float32)
    with torch.no_grad():
        for dynamic in (None, True):  # the latter with numbers of tokens and widths that are not known
            compiled: Any = torch.compile(module, fullgraph=True, backend="eager", dynamic=dynamic)
            assert relative_error(compiled(x_TD), module(x_TD)) < 1e-5


def test_the_blueprint_keeps_it_and_old_digests_stay(tmp_path: Path) -> None:
    plan = plan_of(random_members(4, 37, 0.5))
    made = [Blueprint("llama", "s", "m", {}, {"model.layers.0.mlp": each}) for each in (plan, as_union(plan))]
    made[1].save(tmp_path)
    loaded = Blueprint.load(tmp_path)
    assert loaded.sites["model.layers.0.mlp"].union
    assert loaded.digest() == made[1].digest() != made[0].digest()
    assert "union" not in plan.spec()
    assert any("union False -> True" in line for line in made[0].diff(made[1]))


def test_what_experts_share_cannot_be_changed_for_one() -> None:
    with pytest.raises(InputError, match="union cannot have weights of their own"):
        plan_of(random_members(4, 37, 0.5), union=True, expert_scale=torch.ones(4))


def test_routes_are_the_same_in_both_forms() -> None:
    weights, x_TD = random_ffn(37), random_inputs(50)
    plan = plan_of(random_members(6, 37, 0.5), top_k=2)
    idx_TK, _ = build_ffn(weights, as_union(plan)).route(x_TD)
    expected = [[e for e, _ in choose(weights, plan, x_D)] for x_D in x_TD]
    assert idx_TK.tolist() == expected


def test_one_readout_for_all_experts() -> None:
    weights, member_EF = random_ffn(24), random_members(3, 24, 0.5)
    readout_DF = torch.randn(16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    copies = plan_of(member_EF, torch.arange(4), 2)
    readouts = {}
    for plan in (copies, as_union(copies)):
        readouts[plan.union] = dataclasses.replace(plan, readout=readout_DF[:, plan.packed.clamp(min=0)])
    x_TD = random_inputs(9)
    expected_TD = build_ffn(weights, readouts[False])(x_TD).detach()
    assert relative_error(build_ffn(weights, readouts[True])(x_TD).detach(), expected_TD) < 1e-6
    assert relative_error(reference_ffn(weights, readouts[True], x_TD), expected_TD) < 1e-6


def test_rows_are_those_of_the_weights_loaded_last() -> None:
    weights, x_TD = random_ffn(24), random_inputs(300)
    plans = []
    for seed in (1, 2):
        member_EF = random_members(4, 24, 0.5, seed)
        member_EF[0] |= ~member_EF[1:].any(0)  # every neuron is somebody's, so that both are of one size
        plans.append(as_union(plan_of(member_EF)))
    ffn = build_ffn(weights, plans[0])
    with torch.no_grad():
        ffn(x_TD)
        ffn.load_state_dict(pack(weights, plans[1]))
        assert relative_error(ffn(x_TD), reference_ffn(weights, plans[1], x_TD)) < 1e-5
