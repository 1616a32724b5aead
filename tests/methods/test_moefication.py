from __future__ import annotations

from typing import Any

import pytest
import torch

from moesaic.blueprint.layer import LayerPlan
from moesaic.errors import InputError
from moesaic.methods.moefication.config import Config, resolve_layout
from moesaic.methods.moefication.method import plan_site
from moesaic.nn.ffn import FFNWeights
from tests.ffns import random_ffn, random_inputs


def plan_of(weights: FFNWeights, seed: int = 0, **options: Any) -> LayerPlan:
    return plan_site(weights, None, Config(**options), seed)


def test_router_ranks_the_experts_by_distance_to_the_normalised_input() -> None:
    weights = random_ffn(40, dtype=torch.float32)
    plan = plan_of(weights)
    router, gate_FD = plan.router, weights.gate_FD
    assert gate_FD is not None
    assert router.kind == "linear"
    assert router.normalise_input
    unit_FD = gate_FD / gate_FD.norm(dim=1, keepdim=True)
    centres = torch.stack([unit_FD[expert].mean(dim=0) for expert in plan.experts])
    x_TD = random_inputs(50, dtype=torch.float32)
    unit_TD = x_TD / x_TD.norm(dim=1, keepdim=True)
    scores = unit_TD @ router.tensors["weight"].T + router.tensors["bias"]
    similarity = -(unit_TD.unsqueeze(1) - centres).norm(dim=2)
    assert torch.equal(scores.argsort(dim=1), similarity.argsort(dim=1))
    # the paper's score itself, not only its order
    assert torch.allclose(-(1 - 2 * scores).sqrt(), similarity, atol=1e-5)


def test_planted_groups_become_experts() -> None:
    weights = random_ffn(40)
    truth = torch.randperm(40, generator=torch.Generator().manual_seed(0)) % 8
    assert weights.gate_FD is not None
    planted = torch.eye(16).double()[truth] * torch.linspace(0.1, 9, 40).double().unsqueeze(
        1
    )  # lengths must not matter
    grouped = FFNWeights(weights.up_FD, weights.down_DF, "silu", planted + 1e-3 * weights.gate_FD)
    for expert in plan_of(grouped).experts:
        assert len(torch.unique(truth[expert])) == 1


def test_gate_or_up_rows_are_clustered_as_asked() -> None:
    weights = random_ffn(40)
    up_only = FFNWeights(weights.up_FD, weights.down_DF, "silu")
    packed = {matrix: plan_of(weights, matrix=matrix).packed for matrix in ("auto", "gate", "up")}
    assert torch.equal(packed["auto"], packed["gate"])
    assert not torch.equal(packed["gate"], packed["up"])
    assert torch.equal(packed["up"], plan_of(up_only).packed)
    with pytest.raises(InputError, match="no gate projection"):
        plan_of(up_only, matrix="gate")


def test_shared_units_are_the_neurons_of_largest_norm() -> None:
    weights = random_ffn(40, gated=False)
    large = torch.ones(40).double()
    large[[3, 17, 20, 33, 39]] = 50
    planted = FFNWeights(weights.up_FD, weights.down_DF * large, "silu")
    assert plan_of(planted, layout="S1A3E8").shared.tolist() == [3, 17, 20, 33, 39]


@pytest.mark.parametrize(
    ("layout", "d_ff", "expected"),
    [("S0A6E8", 3072, "S0A72E96"), ("S2A2E8", 320, "S2A3E10"), ("S0A6E8", 20, "S0A1E1"), ("S0A6E8", 100, "S0A3E4")],
)
def test_expert_width_sets_the_number_of_experts(layout: str, d_ff: int, expected: str) -> None:
    assert str(resolve_layout(Config(layout=layout, expert_width=32), d_ff)) == expected


def test_expert_width_bounds_the_experts() -> None:
    plan = plan_of(random_ffn(37), expert_width=8)
    assert [int((expert >= 0).sum()) for expert in plan.experts] == [8, 8, 7, 7, 7]
    assert plan.top_k == 4
