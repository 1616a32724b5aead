from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.calibration.inputs import SiteInputs
from moesaic.methods.random.config import Config as RandomConfig
from moesaic.methods.random.method import plan_site as plan_random
from moesaic.methods.static.config import Config
from moesaic.methods.static.method import plan_site
from moesaic.nn.ffn import FFNWeights
from tests.ffns import random_ffn, random_inputs


def plan_of(weights: FFNWeights, inputs: Tensor | None, **options: Any) -> LayerPlan:
    return plan_site(weights, None if inputs is None else SiteInputs(inputs), Config(**options), 0)


@pytest.mark.parametrize(("gated", "biases"), [(True, False), (False, True)])
def test_the_neurons_that_write_most_stay_in_storage_order(gated: bool, biases: bool) -> None:
    weights, x_TD = random_ffn(40, gated=gated, biases=biases), random_inputs(300)
    written = (weights.hidden(x_TD) * weights.down_DF.norm(dim=0)).square().mean(dim=0)
    plan = plan_of(weights, x_TD)
    assert plan.experts == ()
    assert plan.router.kind == "static"
    assert plan.shared.tolist() == sorted(written.argsort(descending=True)[:30].tolist())


def test_silent_neurons_go_first() -> None:
    weights = random_ffn(40)
    loud = torch.ones(40).double()
    loud[::4] = 0
    planted = FFNWeights(weights.up_FD * loud.unsqueeze(1), weights.down_DF, "silu", weights.gate_FD)
    assert plan_of(planted, random_inputs()).shared.tolist() == [j for j in range(40) if j % 4]


@pytest.mark.parametrize("layout", ["S3A3E8", "S0A6E8", "S1A1E8", "S2A2E16", "S8A0E8", "S0A8E8"])
@pytest.mark.parametrize("d_ff", [37, 40])
def test_as_many_neurons_as_one_token_uses_under_the_layout(layout: str, d_ff: int) -> None:
    weights, x_TD = random_ffn(d_ff), random_inputs()
    routed = plan_random(weights, None, RandomConfig(layout=layout), 0)
    assert abs(plan_of(weights, x_TD, layout=layout).active_neurons - routed.active_neurons) <= 0.5


def test_active_overrides_the_layout() -> None:
    weights, x_TD = random_ffn(40), random_inputs()
    assert len(plan_of(weights, x_TD, layout="S0A1E8", active=0.8).shared) == 32
    assert len(plan_of(weights, x_TD, active=0.001).shared) == 1
    assert torch.equal(plan_of(weights, x_TD, active=1.0).shared, torch.arange(40))


def test_batches_and_bf16_inputs_do_not_change_the_choice() -> None:
    weights, x_TD = random_ffn(40), random_inputs(5000).bfloat16()  # more than one batch
    h_TF = weights.to(torch.float32).hidden(x_TD.float())
    score = (h_TF.double() * weights.down_DF.norm(dim=0)).square().mean(dim=0)
    assert plan_of(weights, x_TD).shared.tolist() == sorted(score.argsort(descending=True)[:30].tolist())


def test_a_fraction_needs_no_units() -> None:
    Config(active=0.5).check(7)
