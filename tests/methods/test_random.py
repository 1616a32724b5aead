from __future__ import annotations

from typing import Any

import pytest
import torch

from moesaic.blueprint.layer import LayerPlan
from moesaic.errors import InputError
from moesaic.methods.random.config import Config
from moesaic.methods.random.method import plan_site
from moesaic.nn.ffn import FFNWeights
from tests.ffns import random_ffn, random_inputs, relative_error, sum_of_parts


def plan_of(weights: FFNWeights, seed: int = 0, **options: Any) -> LayerPlan:
    return plan_site(weights, None, Config(**options), seed)


@pytest.mark.parametrize("layout", ["S3A3E8", "S0A6E8", "S0A8E8", "S8A0E8", "S0A1E37"])
@pytest.mark.parametrize(("gated", "biases"), [(True, False), (False, True)])
def test_split_is_balanced_and_exact_with_all_experts_on(layout: str, gated: bool, biases: bool) -> None:
    weights = random_ffn(37, gated=gated, biases=biases)
    x_TD = random_inputs()
    plan = plan_of(weights, layout=layout)
    assert plan.is_partition
    sizes = [int((expert >= 0).sum()) for expert in plan.experts]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert plan.gate == "uniform"
    assert relative_error(sum_of_parts(weights, plan, x_TD), weights(x_TD)) < 1e-12


def test_the_order_is_random_and_the_seed_fixes_everything() -> None:
    weights = random_ffn(40)
    state = torch.get_rng_state()
    a, b, c = (plan_of(weights, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.packed, b.packed)
    assert torch.equal(a.router.tensors["weight"], b.router.tensors["weight"])
    assert not torch.equal(a.packed, c.packed)
    assert not torch.equal(a.packed, torch.arange(40))
    assert not torch.equal(a.router.tensors["weight"], c.router.tensors["weight"])


def test_router_scores_of_unit_variance_inputs_have_unit_variance() -> None:
    weights = random_ffn(64, 256, dtype=torch.float32)
    router_ED = plan_of(weights, layout="S0A8E64").router.tensors["weight"]
    assert router_ED.shape == (64, 256)
    assert float(router_ED.std()) == pytest.approx(256**-0.5, rel=0.02)


@pytest.mark.parametrize(
    ("active", "expected"), [(0.8, 13 / 16), (0.75, 12 / 16), (0.5, 0.5), (1.0, 1.0), (0.01, 1 / 16)]
)
def test_active_picks_the_nearest_of_16_units(active: float, expected: float) -> None:
    plan = plan_of(random_ffn(64), layout="S0A1E8", active=active)
    assert plan.active_neurons / 64 == pytest.approx(expected)


def test_active_on_an_ffn_of_few_neurons() -> None:
    Config(active=0.5).check(5)
    assert plan_of(random_ffn(5), active=0.5).is_partition


def test_no_data_and_no_more_units_than_neurons() -> None:
    assert not Config().needs_calibration()
    with pytest.raises(InputError, match="only 7 neurons"):
        Config().check(7)
