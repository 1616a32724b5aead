"""Stability of splits: known indices, chance beside them, planted groups that must be found again, shifted routers.

Axes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from benchmarks.stability_measures import (
    adjusted_rand,
    jaccard,
    matched_jaccard,
    members,
    partition_agreement,
    random_jaccard,
    reconstruction_errors,
    usage_agreement,
    used_neurons,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.adjust.router import fit_linear_router
from moesaic.adjust.router_config import RouterFitConfig
from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.evaluate.fidelity import site_fidelity
from moesaic.materialise.apply import build_ffn
from moesaic.methods.random.config import Config as RandomConfig
from moesaic.methods.random.method import plan_site as random_plan
from moesaic.methods.token_clusters.config import Config as ClustersConfig
from moesaic.methods.token_clusters.method import plan_site as clusters_plan
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.reference import choose, reference_ffn
from tests.ffns import random_ffn, random_inputs


@pytest.mark.parametrize(
    ("one", "other", "value"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),
        ([0, 0, 1, 1], [1, 1, 0, 0], 1.0),
        ([0, 0, 1, 2], [0, 0, 1, 1], 4 / 7),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0.0),
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),
        ([0, 1, 2], [2, 0, 1], 1.0),
        ([5, 5, 5], [0, 0, 0], 1.0),
        ([3], [1], 1.0),
    ],
)
def test_adjusted_rand_of_known_labellings(one: list[int], other: list[int], value: float) -> None:
    assert adjusted_rand(torch.tensor(one), torch.tensor(other)) == pytest.approx(value)
    assert adjusted_rand(torch.tensor(other), torch.tensor(one)) == pytest.approx(value)


def test_adjusted_rand_of_independent_labellings_is_zero_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(5, (200, 2, 60), generator=generator)
    found = torch.tensor([adjusted_rand(one, other) for one, other in draws])
    assert abs(float(found.mean())) < 0.01
    assert float(found.std()) > 0.005
    with pytest.raises(InputError, match="60 and 59"):
        adjusted_rand(draws[0, 0], draws[0, 1, :-1])


@given(st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=25, deadline=None)
def test_random_jaccard_is_the_mean_over_all_sets(one: int, other: int) -> None:
    fixed = set(range(one))
    found = [
        len(fixed & set(chosen)) / len(fixed | set(chosen)) if fixed or chosen else 1.0
        for chosen in combinations(range(6), other)
    ]
    assert random_jaccard(one, other, 6) == pytest.approx(sum(found) / len(found))


def family(*sets: list[int], of: int = 12) -> Tensor:
    found_EF = torch.zeros(len(sets), of, dtype=torch.bool)
    for row_F, chosen in zip(found_EF, sets, strict=True):
        row_F[chosen] = True
    return found_EF


def test_matching_is_the_best_one_to_one_and_not_the_greedy_one() -> None:
    one = family([0, 1, 2, 3, 4], [0, 1, 2, 3])
    other = family([0, 1, 2, 3], [4])
    # the nearest pair, two equal sets, leaves 1/5 for the rest: 1.2 in all; the other matching 4/5 and 0
    assert matched_jaccard(one, other) == pytest.approx((1 + 1 / 5) / 2)
    crossed = family([0, 1, 2, 3], [2, 3, 4, 5, 6, 7])
    near = family([2, 3, 4, 5, 0, 1], [8, 9, 2, 3, 4])
    direct = jaccard(crossed[0], near[0]) + jaccard(crossed[1], near[1])
    swapped = jaccard(crossed[0], near[1]) + jaccard(crossed[1], near[0])
    assert matched_jaccard(crossed, near) == pytest.approx(max(direct, swapped) / 2)
    assert matched_jaccard(one[[1, 0]], one) == 1
    assert matched_jaccard(one, one[:1]) == pytest.approx(1 / 2)


def plan(shared: list[int], *experts: list[int], top_k: int = 1, d_ff: int = 12) -> LayerPlan:
    router = Router("linear", {"weight": torch.eye(len(experts), 16)})
    return LayerPlan(d_ff, torch.tensor(shared), tuple(torch.tensor(e) for e in experts), top_k, router)


def test_the_same_split_under_other_numbers_agrees_fully() -> None:
    one = plan([0, 1], [2, 3, 4], [5, 6, 7], [8, 9, -1])
    other = plan([1, 0], [9, 8, -1], [4, 2, 3], [5, 6, 7])
    found = partition_agreement(one, other)
    assert (found.shared, found.rand, found.matched) == (1, 1, 1)
    assert found.shared_random == pytest.approx(random_jaccard(2, 2, 12))
    assert found.matched_random is not None
    assert found.matched_random < 0.7
    assert members(one).sum() == 8


def test_overlapping_and_static_plans_have_the_figures_that_fit_them() -> None:
    overlapping = partition_agreement(plan([0], [1, 2, 3], [2, 3, 4]), plan([0], [2, 3, 4], [1, 2, 3]))
    assert overlapping.rand is None
    assert overlapping.matched == 1
    kept, others = LayerPlan(12, torch.arange(9)), LayerPlan(12, torch.arange(3, 12))
    found = partition_agreement(kept, others)
    assert (found.shared, found.rand, found.matched, found.matched_random) == (0.5, None, None, None)
    assert found.shared_random == pytest.approx(random_jaccard(9, 9, 12))
    assert partition_agreement(plan([], [0, 1], [2, 3]), plan([0], [1, 2], [3, 4])).shared is None
    with pytest.raises(InputError, match="12 and 8 neurons"):
        partition_agreement(kept, LayerPlan(8, torch.arange(3)))


def test_random_partitions_agree_as_chance_says() -> None:
    weights = random_ffn(240)
    one, other = (random_plan(weights, None, RandomConfig(layout="S3A3E8"), seed) for seed in (0, 1))
    found = partition_agreement(one, other)
    assert found.rand == pytest.approx(0, abs=0.03)
    assert found.shared == pytest.approx(found.shared_random, abs=0.05)
    assert found.matched == pytest.approx(found.matched_random, abs=0.03)
    inputs = SiteInputs(random_inputs(400))
    usage = usage_agreement(used_neurons(weights, one, inputs), used_neurons(weights, other, inputs))
    assert usage.used == pytest.approx(usage.used_random, abs=0.03)
    assert usage.used_random == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("gate", ["uniform", "scaled"])
def test_used_neurons_and_errors_are_those_of_the_reference(gate: str) -> None:
    weights, inputs = random_ffn(12, biases=True, dtype=torch.float32), SiteInputs(random_inputs(9).float())
    split = plan([0, 5], [1, 2, 3], [4, 3, -1], [6, 7, 8], top_k=2)
    split = LayerPlan(12, split.shared, split.experts, 2, split.router, "scaled" if gate == "scaled" else "uniform")
    used_TF = used_neurons(weights, split, inputs)
    for x_D, used_F in zip(inputs.x_TD, used_TF, strict=True):
        wanted = {0, 5}.union(*(split.experts[e].tolist() for e, _ in choose(weights, split, x_D))) - {-1}
        assert set(used_F.nonzero().flatten().tolist()) == wanted
    dense_TD, found_TD = weights(inputs.x_TD), reference_ffn(weights, split, inputs.x_TD)
    wanted_T = (found_TD - dense_TD).square().sum(1) / dense_TD.square().sum(1)
    torch.testing.assert_close(reconstruction_errors(weights, split, inputs), wanted_T)
    whole = LayerPlan(12, torch.arange(12))
    assert reconstruction_errors(weights, whole, inputs).max() < 1e-10
    assert used_neurons(weights, whole, inputs).all()


def test_experts_stored_once_are_measured_like_copies() -> None:
    weights, inputs = random_ffn(12, dtype=torch.float32), SiteInputs(random_inputs(40).float())
    copies = plan([0], [1, 2, 3, 4], [3, 4, 5, 6], [1, 6, 7, 8])
    once = replace(copies, union=True)
    assert partition_agreement(copies, once).matched == 1
    assert torch.equal(used_neurons(weights, copies, inputs), used_neurons(weights, once, inputs))
    errors = [reconstruction_errors(weights, split, inputs) for split in (copies, once)]
    torch.testing.assert_close(*errors)
    found = [site_fidelity("ffn", build_ffn(weights, split), inputs) for split in (copies, once)]
    assert found[0].energy_router == pytest.approx(found[1].energy_router, rel=1e-5)
    assert found[0].overlap == found[1].overlap


E, D, PER_GROUP = 4, 16, 12


def grouped(tokens: int, seed: int, *, signed: bool = False, shift: int = 0) -> SiteInputs:
    """Tokens of E groups. Coordinate g < E names group g; a loud content stands in coordinates 4 + 3 g to 6 + 3 g.
    ``signed``: the contents have either sign. ``shift``: the name is that of another group."""
    generator = torch.Generator().manual_seed(seed)
    group_T = torch.randint(E, (tokens,), generator=generator)
    x_TD = 0.05 * torch.randn(tokens, D, generator=generator)
    x_TD[torch.arange(tokens), (group_T + shift) % E] += 1
    sign_T3 = 2.0 * torch.randint(2, (tokens, 3), generator=generator) - 1 if signed else torch.ones(tokens, 3)
    x_TD[torch.arange(tokens)[:, None], E + 3 * group_T[:, None] + torch.arange(3)] += sign_T3
    return SiteInputs(x_TD)


def group_ffn(*, signed: bool = False) -> FFNWeights:
    """Each group has neurons of its own, which read its contents: positively, or ``signed``, in pairs w and -w, so that
    no linear router can read off the contents how loud they will be."""
    generator = torch.Generator().manual_seed(0)
    up_FD = torch.zeros(E * PER_GROUP, D)
    for group in range(E):
        rows = torch.randn(PER_GROUP, 3, generator=generator).abs()
        if signed:
            rows[PER_GROUP // 2 :] = -rows[: PER_GROUP // 2]
        up_FD[group * PER_GROUP : (group + 1) * PER_GROUP, E + 3 * group : E + 3 * group + 3] = rows
    return FFNWeights(up_FD, torch.randn(D, E * PER_GROUP, generator=generator), "relu")


def test_planted_groups_are_found_again_in_another_half_and_random_ones_are_not() -> None:
    weights, common = group_ffn(), grouped(300, 9)
    config = ClustersConfig(active=1 / E, split="disjoint", experts=E, shared=0)
    one, other = (clusters_plan(weights, grouped(400, half), config, half) for half in (1, 2))
    found = partition_agreement(one, other)
    assert (found.rand, found.matched) == (1, 1)
    assert found.matched_random is not None
    assert found.matched_random < 0.3
    assert usage_agreement(used_neurons(weights, one, common), used_neurons(weights, other, common)).used > 0.95
    random = [random_plan(weights, None, RandomConfig(layout="S0A1E4"), seed) for seed in (1, 2)]
    used = [used_neurons(weights, split, common) for split in random]
    assert usage_agreement(*used).used < 0.5


def test_a_domain_that_names_groups_otherwise_misleads_the_router() -> None:
    weights = group_ffn(signed=True)
    experts = torch.arange(E * PER_GROUP).split(PER_GROUP)
    start = LayerPlan(E * PER_GROUP, torch.arange(0), experts, 1, Router("linear", {"weight": torch.zeros(E, D)}))
    split, _ = fit_linear_router(start, weights, grouped(800, 1, signed=True), RouterFitConfig.model_validate({}))
    texts = [grouped(400, 2, signed=True, shift=shift) for shift in (0, 1)]
    home, away = (site_fidelity("ffn", build_ffn(weights, split), text) for text in texts)
    assert home.tokens == away.tokens == 400
    assert home.overlap > 0.95
    assert away.overlap < 0.1
    assert home.energy_router > 0.9 > 0.1 > away.energy_router
    assert away.energy_oracle == pytest.approx(home.energy_oracle, abs=0.02)
    errors = [float(reconstruction_errors(weights, split, text).mean()) for text in texts]
    assert errors[0] < 0.1 < 0.9 < errors[1]
