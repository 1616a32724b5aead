from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.errors import InputError
from moesaic.materialise.apply import apply_blueprint, build_ffn
from moesaic.methods.base import ModelPlan
from moesaic.methods.tomoe.export import export, layer_plan
from moesaic.methods.tomoe.hard import HardGates, expert_masks, hard_mask_model, value_mask
from moesaic.methods.tomoe.task import ToMoETask
from tests.ffns import random_ffn, random_inputs
from tests.methods.tomoe.tiny import ATTENTION, randomise_controller, tiny_task, tokens
from tests.tiny_models import FAMILIES


def trained(family: str = "llama", **options: Any) -> ToMoETask:
    """A task whose masks, routers and attention predictors are random and spread."""
    return randomise_controller(tiny_task(family, **{"active": 0.85, "bias": -1.0, **options}))


def blueprint(task: ToMoETask, plan: ModelPlan) -> Blueprint:
    return Blueprint(task.anatomy.family.name, "", "tomoe", {}, plan.sites, attention=plan.attention)


def hard_logits(task: ToMoETask, plan: ModelPlan) -> Tensor:
    with torch.no_grad(), hard_mask_model(task.base, plan, task.anatomy):
        return task.base(input_ids=tokens()).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("experts", [1, 4])
def test_export_equals_the_hard_mask_model(family: str, experts: int) -> None:
    """O19: the converted model against masks on the dense one; every family, with what its attention allows."""
    attention = ATTENTION[family]
    task = trained(family, attention=attention, experts=experts)
    plan = export(task, tokens())
    expected = hard_logits(task, plan)
    with torch.no_grad():
        dense = task.base(input_ids=tokens()).logits
        apply_blueprint(task.base, blueprint(task, plan), task.anatomy)
        found = task.base(input_ids=tokens()).logits
    assert float((found - expected).abs().max()) <= 1e-4
    assert not torch.allclose(expected, dense, atol=1e-2)


@pytest.mark.parametrize(
    "options", [{"top_k": 2}, {"widths": "free"}, {"widths": "equal"}, {"experts": 16}, {"union": True}]
)
def test_export_of_other_forms_equals_the_hard_mask_model(options: dict[str, Any]) -> None:
    """O19."""
    task = trained(**options)
    plan = export(task, tokens())
    expected = hard_logits(task, plan)
    with torch.no_grad():
        apply_blueprint(task.base, blueprint(task, plan), task.anatomy)
        found = task.base(input_ids=tokens()).logits
    assert float((found - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("options", [{}, {"attention": "both"}, {"attention": "both", "masks": "random"}])
def test_the_sampled_model_without_noise_is_the_exported_one(options: dict[str, Any]) -> None:
    """What held-out text is judged with while training is what is exported."""
    task = tiny_task(**options) if "masks" in options else trained(**options)
    decoded, shift = task.decode()
    gates = task.hard_gates(decoded, shift, torch.arange(2))
    logits = task.run(gates, tokens())
    plan = export(task, tokens())
    torch.testing.assert_close(logits, hard_logits(task, plan))
    hard = HardGates(list(plan.sites.values()), list(plan.attention.values()) or None)
    task.run(hard, tokens())
    assert all(torch.equal(gates.choices[place], hard.routes[place]) for place in range(2))
    assert plan.report["active"] <= task.config.active


@pytest.mark.parametrize(
    "sets", [[[], [5], list(range(40))], [[0, 1], [2, 3], [4, 5]], [[0, 1, 2], [1, 2, 3], [2, 3, 4]], [[7], [7], [7]]]
)
@pytest.mark.parametrize("one_for_all", [False, True])
def test_an_expert_is_the_masked_ffn(sets: list[list[int]], one_for_all: bool) -> None:
    """O20: widths 0, 1, all; disjoint, overlapping, equal; tokens spread and all on one expert."""
    weights, x_TD = random_ffn(40), random_inputs(50)
    mask_NF = torch.zeros(3, 40)
    for expert, index in enumerate(sets):
        mask_NF[expert, index] = 1
    router_ND = torch.randn(3, weights.d_model, generator=torch.Generator().manual_seed(0))
    if one_for_all:
        router_ND.zero_()  # all tie: the first expert gets every token
    plan = layer_plan(mask_NF, router_ND)
    route_TN = torch.nn.functional.one_hot((x_TD.float() @ router_ND.T).argmax(1), 3).float()
    weights = weights.to(torch.float32)
    expected = (weights.hidden(x_TD.float()) * (route_TN @ mask_NF)) @ weights.down_DF.T
    with torch.no_grad():
        found = build_ffn(weights, plan)(x_TD.float())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(expert_masks(plan), mask_NF)


def test_the_union_is_the_or_of_the_experts_and_weights_are_the_models_own() -> None:
    """O21."""
    task = trained(union=True)
    plan = export(task, tokens())
    for site in plan.sites.values():
        held = expert_masks(site).bool()
        assert torch.equal(site.union_neurons.sort().values, torch.nonzero(held.any(0)).flatten())
        assert site.readout is None
        assert site.bias is None
        for expert, row in zip(site.experts, site.membership.bool(), strict=True):
            kept = expert[expert >= 0]
            assert torch.equal(site.union_neurons[row].sort().values, kept.sort().values)


def test_export_is_deterministic_and_survives_the_disk(tmp_path: Path) -> None:
    """O22."""
    plans = [export(trained("qwen2", attention="both"), tokens()) for _ in range(2)]
    prints = [blueprint(trained("qwen2", attention="both"), plan) for plan in plans]
    assert prints[0].digest() == prints[1].digest()
    prints[0].save(tmp_path)
    assert Blueprint.load(tmp_path).digest() == prints[0].digest()
    assert plans[0].report == plans[1].report


def test_caps_of_the_value_dims() -> None:
    """O24: at most K, at least one; K = h changes nothing; tokens under the cap are as they were."""
    task = trained("llama", attention="values", cap="quantile")
    plan = export(task, tokens()).attention["model.layers.0.self_attn"]
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    free = value_mask(replace(plan, cap=None), x)
    assert torch.equal(value_mask(replace(plan, cap=8), x), free)
    assert int(free.sum(-1).max()) > int(free.sum(-1).min()) >= 1
    cap = int(free.sum(-1).median())
    capped = value_mask(replace(plan, cap=cap), x)
    assert int(capped.sum(-1).max()) == cap
    below = free.sum(-1) <= cap
    assert torch.equal(capped[below], free[below])
    assert bool((capped <= free).all())
    never = value_mask(replace(plan, threshold=1e6), x)
    assert torch.equal(never.sum(-1), torch.ones(50))


def test_caps_come_from_a_quantile_of_held_out_tokens() -> None:
    caps = {}
    for quantile in (0.3, 1.0):
        plan = export(trained("llama", attention="values", cap="quantile", cap_quantile=quantile), tokens())
        caps[quantile] = [attention.cap for attention in plan.attention.values()]
    assert all(small < large for small, large in zip(caps[0.3], caps[1.0], strict=True))  # type: ignore[operator]


def test_caps_fall_where_attention_would_leave_the_neurons_nothing() -> None:
    task = trained("llama", attention="values", cap="quantile", cap_quantile=1.0, active=0.9)
    free = export(task, tokens()).attention["model.layers.0.self_attn"].cap
    fixed = task.budget.unpruned() + sum(cost.neuron for cost in task.budget.costs)
    dim = sum(cost.dim for cost in task.budget.costs)
    task.budget = replace(task.budget, target=(fixed + 2.5 * dim) / task.budget.total)
    plan = export(task, tokens())
    assert plan.attention["model.layers.0.self_attn"].cap == 2 < (free or 0)
    assert plan.report["active"] <= task.budget.target


@pytest.mark.parametrize("attention", ["none", "both"])
@pytest.mark.parametrize("widths", ["free", "layer", "equal"])
def test_the_reported_ratio_is_that_of_the_exported_shapes(attention: str, widths: str) -> None:
    """O25: within the budget and as near as one neuron (of every FFN, where all are equal)."""
    task = trained("llama", attention=attention, widths=widths, active=0.6)
    plan = export(task, tokens())
    used = 0.0
    for site in plan.sites.values():
        used += 3 * 32 * max(int((expert >= 0).sum()) for expert in site.experts)
    for layer in range(2):
        block = plan.attention.get(f"model.layers.{layer}.self_attn")
        used += 32 * (4 + 2) * ((8 + 8) if block is None else len(block.kept) + (block.cap or 8))
    total = 2 * (3 * 32 * 37 + 2 * 32 * 6 * 8)
    assert plan.report["active"] == pytest.approx(used / total)
    neuron = 3 * 32 * (2 if widths == "equal" else 1)
    assert 0 <= task.config.active - used / total < neuron / total
    assert plan.report["active_mean"] <= plan.report["active"] + 1e-9
    loads = plan.report["layers"]["model.layers.0.mlp"]["loads"]
    assert sum(loads) == pytest.approx(1, abs=1e-3)


def test_random_attention_masks_are_constant_and_of_the_wanted_size() -> None:
    plans = export(tiny_task("llama", attention="both", masks="random", active=0.75), tokens()).attention
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    for plan in plans.values():
        assert len(plan.kept) == 6
        masks = value_mask(plan, x)
        assert masks.sum(-1).tolist() == [6.0] * 20
        assert torch.equal(masks, masks[:1].expand(20, -1))


def test_what_cannot_be_exported_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be exported"):
        export(trained(attention="dynamic"), tokens())
    with pytest.raises(InputError, match="stay dense"):
        tiny_task(active=0.4)


def test_one_expert_is_a_static_plan() -> None:
    plan = export(trained(experts=1), tokens()).sites["model.layers.0.mlp"]
    assert isinstance(plan, LayerPlan)
    assert plan.router.kind == "static"
    assert plan.experts == ()
