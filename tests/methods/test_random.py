from __future__ import annotations

from typing import Any

import pytest
import torch

from moesaic.blueprint.layer import LayerPlan
from moesaic.methods.random.config import Config
from moesaic.methods.random.method import plan_site
from moesaic.nn.ffn import FFNWeights
from tests.ffns import random_ffn


def plan_of(weights: FFNWeights, seed: int = 0, **options: Any) -> LayerPlan:
    return plan_site(weights, None, Config(**options), seed)


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
