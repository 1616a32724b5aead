from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.materialise.pack import pack
from moesaic.methods.llama_moe.config import Config
from moesaic.methods.llama_moe.method import plan_site
from moesaic.nn.ffn import FFNWeights
from tests.ffns import random_ffn, random_inputs


def plan_of(weights: FFNWeights, inputs: Tensor | None = None, seed: int = 0, **options: Any) -> LayerPlan:
    return plan_site(weights, None if inputs is None else SiteInputs(inputs), Config(**options), seed)


def test_contiguous_experts_are_slices_in_storage_order_shared_first() -> None:
    plan = plan_of(random_ffn(40), layout="S1A1E8", split="contiguous")
    assert torch.equal(plan.packed, torch.arange(40))
    assert plan.shared.tolist() == [0, 1, 2, 3, 4]


def test_kaiming_rows_are_uniform_within_the_bound_of_a_linear_layer() -> None:
    weights = random_ffn(64, 256, dtype=torch.float32)
    router_ED = plan_of(weights, layout="S0A8E64").router.tensors["weight"]
    bound = 256**-0.5
    assert router_ED.shape == (64, 256)
    assert float(router_ED.abs().max()) <= bound
    assert float(router_ED.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert abs(float(router_ED.mean())) < 0.01 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centroid_rows_are_the_centres_of_planted_token_groups(dtype: torch.dtype) -> None:
    weights = random_ffn(40)
    truth = torch.arange(400) % 8
    centres = 5 * torch.eye(16)[:8]
    inputs = (centres[truth] + 0.1 * random_inputs(400, dtype=torch.float32)).to(dtype)
    router_ED = plan_of(weights, inputs, router="centroids").router.tensors["weight"]
    assert router_ED.dtype == torch.float32
    found = (router_ED @ centres.T).argmax(dim=1)
    assert sorted(found.tolist()) == list(range(8))
    assert torch.allclose(router_ED, centres[found], atol=0.1)
    chosen = (inputs.float() @ router_ED.T).argmax(dim=1)
    assert torch.equal(found[chosen], truth)


def test_centroids_use_a_bounded_number_of_tokens_from_the_whole_text() -> None:
    inputs = random_inputs(1000, dtype=torch.float32)
    config = Config(router="centroids", router_tokens=16, rounds=1)
    router_ED = plan_site(random_ffn(40), SiteInputs(inputs), config, 0).router.tensors["weight"]
    picked = inputs[torch.arange(16) * 1000 // 16]
    assert torch.allclose(router_ED.mean(dim=0), picked.mean(dim=0), atol=1e-5)  # 8 clusters of 2 tokens each


def test_centroids_need_tokens() -> None:
    with pytest.raises(InputError, match="at least one token per expert"):
        plan_of(random_ffn(40), random_inputs(7), router="centroids")


def test_score_scale_is_the_factor_on_weights_that_sum_to_one() -> None:
    weights = random_ffn(40)
    for gate in ("uniform", "softmax_topk"):
        plan = plan_of(weights, layout="S0A2E8", gate=gate, score_scale=4.0)
        # the runtime weighs k experts with a sum of k, so s = 4 at k = 2 doubles each
        assert plan.gate == gate
        assert plan.expert_scale is not None
        assert plan.expert_scale.tolist() == [2.0] * 8
        plain = plan_of(weights, layout="S0A2E8", gate=gate)
        assert torch.equal(pack(weights, plan)["down_proj.weight"], 2 * pack(weights, plain)["down_proj.weight"])


def test_without_routed_experts_there_is_no_gate() -> None:
    options: dict[str, Any] = {"layout": "S8A0E8", "gate": "softmax_topk"}
    plan = plan_of(random_ffn(37), **options)
    assert (plan.router.kind, plan.gate) == ("static", "uniform")
    assert Config(**options).sizes(37).gate == "uniform"


def test_scale_e_with_all_experts_on_is_dense() -> None:
    plan = plan_of(random_ffn(40), layout="S0A8E8", score_scale=8.0)
    assert plan.expert_scale is None
    assert plan.top_k == 8
