"""Secret MoE: what is trained is what is written, training pays, sizes hold, bad input is refused.

Axes: T tokens, D model width, P packed neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.jobs.convert import convert
from moesaic.materialise.apply import build_ffn
from moesaic.methods.secret_moe.config import Config
from moesaic.methods.secret_moe.method import plan_site
from moesaic.methods.secret_moe.student import CoarseStudent
from moesaic.methods.token_clusters.method import plan_site as clusters
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.reference import reference_ffn
from tests.ffns import random_ffn, random_inputs

OPTIONS: dict[str, Any] = {"active": 0.5, "width": 4, "rank": 3, "steps": 60, "batch": 64, "rate": 3e-3}


def grouped(tokens: int = 600, d_ff: int = 48, **form: Any) -> tuple[FFNWeights, Tensor]:
    """An FFN whose token groups make other neurons loud, so that routing pays."""
    group_T = torch.randint(4, (tokens,), generator=torch.Generator().manual_seed(2))
    x_TD = random_inputs(tokens, seed=3, dtype=torch.float32) * 0.3 + 3 * torch.eye(16)[group_T]
    return random_ffn(d_ff, dtype=torch.float32, **form), x_TD


def plan_of(weights: FFNWeights, x_TD: Tensor, **options: Any) -> LayerPlan:
    return plan_site(weights, SiteInputs(x_TD), Config(**(OPTIONS | options)), 0)


@torch.no_grad()
def error(weights: FFNWeights, plan: LayerPlan, x_TD: Tensor) -> float:
    y_TD = weights(x_TD)
    return float(((build_ffn(weights, plan)(x_TD) - y_TD).square().sum(1) / y_TD.square().sum(1)).mean())


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ({"gated": True}, {}),
        ({"gated": True, "biases": True}, {"rank": None}),
        ({"gated": False, "biases": True, "activation": "gelu"}, {}),
        ({"gated": True}, {"shared": 1.0}),
        ({"gated": True}, {"shared": 0.0}),
        ({"gated": True}, {"split": "overlapping", "max_params": 5.0}),
    ],
)
@torch.no_grad()
def test_runtime_and_oracle_compute_what_was_trained(form: dict[str, Any], options: dict[str, Any]) -> None:
    weights, x_TD = grouped(d_ff=47, **form)
    config = Config(**(OPTIONS | options))
    start = clusters(weights, SiteInputs(x_TD), config.start(47), 0)
    student = CoarseStudent(weights, start, x_TD, config.rank, config.spread)
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    plan = student.plan()
    y_TD = student(x_TD[:40])
    torch.testing.assert_close(build_ffn(weights, plan)(x_TD[:40]), y_TD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference_ffn(weights, plan, x_TD[:40]), y_TD, rtol=1e-4, atol=1e-5)


def test_training_lowers_the_error_on_tokens_it_did_not_see() -> None:
    weights, x_TD = grouped(1200)
    seen, unseen = x_TD[:900], x_TD[900:]
    before, after = (error(weights, plan_of(weights, seen, steps=steps), unseen) for steps in (0, 200))
    assert after < 0.7 * before


def test_routing_beats_the_static_control_of_the_same_size_and_training() -> None:
    weights, x_TD = grouped(1200)
    seen, unseen = x_TD[:900], x_TD[900:]
    options = {"active": 0.25, "shared": 0.3, "rank": None, "steps": 200}
    routed, static = (plan_of(weights, seen, **(options | change)) for change in ({}, {"shared": 1.0}))
    assert routed.active_neurons <= static.active_neurons + 1
    assert static.router.kind == "static"
    assert error(weights, routed, unseen) < 0.8 * error(weights, static, unseen)


def test_a_full_router_starts_with_the_choices_of_the_clusters() -> None:
    weights, x_TD = grouped()
    config = Config(**(OPTIONS | {"rank": None}))
    start = clusters(weights, SiteInputs(x_TD), config.start(48), 0)
    student = CoarseStudent(weights, start, x_TD, None, 0.25)
    chosen = build_ffn(weights, start).route(x_TD)[0].sort(1).values
    again = student.scores(x_TD).topk(start.top_k, dim=1).indices.sort(1).values
    assert float((chosen == again).all(1).float().mean()) > 0.99
    assert float(student.scores(x_TD).std().detach()) == pytest.approx(0.25, rel=1e-3)
    weight_TP = student.weights(x_TD)
    assert float(weight_TP[weight_TP > 0].min().detach()) > 0.5


@pytest.mark.parametrize(
    ("d_ff", "active", "shared", "width"), [(1536, 0.75, 0.5, 32), (4864, 0.5, 0.5, 64), (48, 0.5, 0.0, 4)]
)
def test_parts_have_the_sizes_asked_for(d_ff: int, active: float, shared: float, width: int) -> None:
    parts = Config(active=active, shared=shared, width=width).sizes(d_ff)
    used = parts.shared + parts.top_k * sum(parts.own) / len(parts.own)
    assert used == pytest.approx(active * d_ff, rel=0.02)
    assert parts.shared / used == pytest.approx(shared, abs=0.05)
    assert max(parts.own) == pytest.approx(width, rel=0.1)
    assert parts.shared + sum(parts.own) == d_ff


def test_nothing_trained_keeps_the_neurons() -> None:
    weights, x_TD = grouped(300)
    untouched = plan_of(weights, x_TD, steps=0)
    assert torch.equal(untouched.projections["up_FD"], weights.take(untouched.packed).up_FD)


def test_refusals() -> None:
    weights, x_TD = grouped(10)
    with pytest.raises(InputError, match="needs calibration inputs"):
        plan_site(weights, SiteInputs(x_TD[:1]), Config(), 0)
    with pytest.raises(InputError, match="experts of 1 neurons"):
        Config(width=1).check(4864)


@pytest.mark.parametrize("target", ["moesaic", "granitemoeshared"])
def test_a_converted_model_runs_in_transformers(target: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    calibration = {"sources": "tiny", "tokens": 512, "window": 64, "compute_dtype": "float32"}
    options = {"active": 0.6, "width": 4, "rank": 2, "steps": 10}
    done = convert(
        tiny("llama"), tmp_path / "out", method="secret_moe", options=options, calibration=calibration, target=target
    )
    model = AutoModelForCausalLM.from_pretrained(done.output, dtype=torch.float32)
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        assert bool(model(ids).logits.isfinite().all())
    assert done.target == target
    if target == "moesaic":
        assert model.config.ffn_sites["model.layers.0.mlp"]["router"] == "low_rank"
