"""Which target is taken, and what is said where one does not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.errors import InputError
from moesaic.targets import TARGETS, choose_target, get_target
from moesaic.targets.base import Split, TargetOptions
from tests.targets.helpers import plan_of, plans_for, split_for
from tests.tiny_models import build_tiny

Tiny = Callable[[str], Path]


def changed(folder: Path, **fields: Any) -> Split:
    """The split of a tiny model with the same change in each plan."""
    return split_for(folder, {path: replace(plan, **fields) for path, plan in plans_for(folder).items()})


def reasons(split: Split, target: str) -> str:
    return " | ".join(get_target(target).reasons(split))


@pytest.mark.parametrize(
    ("family", "layout", "fields", "expected"),
    [
        ("llama", "S2A2E6", {}, "glm4_moe"),
        ("llama", "S2A2E6", {"gate": "softmax_topk"}, "granitemoeshared"),
        ("llama", "S0A2E5", {}, "mixtral"),
        ("llama", "S2A2E6", {"router": "static"}, "dense"),
        ("qwen2", "S0A2E5", {}, "glm4_moe"),
        ("qwen3", "S2A2E6", {}, "moesaic"),  # attention bias: only qwen3_moe, which would compute more than dense
        ("qwen3", "S1A1E6", {}, "qwen3_moe"),
        ("olmo2", "S1A1E6", {}, "flex_olmo"),
        ("gemma2", "S2A2E6", {}, "moesaic"),
        ("gpt2", "S2A2E6", {}, "moesaic"),
    ],
)
def test_auto_takes_the_first_that_fits(
    family: str, layout: str, fields: dict[str, Any], expected: str, tiny: Tiny
) -> None:
    split = split_for(tiny(family), plans_for(tiny(family), layout, **fields))
    choice = choose_target(split)
    assert choice.name == expected
    assert choice.target is get_target(expected)
    assert all(choice.refused.values())


@pytest.mark.parametrize(
    ("layout", "fields", "paired", "expected"),
    [
        ("S0A1E5", {}, False, "mixtral"),
        ("S0A2E5", {}, True, "glm4_moe"),  # mixtral only approaches weights of 1
        ("S0A2E5", {"gate": "softmax_topk"}, False, "mixtral"),
        ("S2A2E6", {}, True, "glm4_moe"),
        ("S2A2E6", {}, False, "moesaic"),
    ],
)
def test_auto_with_options_takes_what_computes_the_same_function(
    layout: str, fields: dict[str, Any], paired: bool, expected: str, tiny: Tiny
) -> None:
    split = split_for(tiny("llama"), plans_for(tiny("llama"), layout, **fields))
    assert choose_target(split, "auto", TargetOptions(exact_weights=paired)).name == expected


def test_an_explicit_target_that_does_not_fit_is_refused_with_reason_and_remedy(tiny: Tiny) -> None:
    split = split_for(tiny("qwen2"), plans_for(tiny("qwen2")))
    with pytest.raises(InputError) as error:
        choose_target(split, "mixtral")
    assert "biases" in error.value.message
    assert error.value.hint == "use --target glm4_moe"


def test_experts_of_different_widths_are_ours_alone(tiny: Tiny) -> None:
    plans = plans_for(tiny("llama"), "S0A1E4")
    varied = {path: replace(p, experts=(p.experts[0][:2], *p.experts[1:]), union=True) for path, p in plans.items()}
    split = split_for(tiny("llama"), varied)
    assert choose_target(split, "auto").name == "moesaic"
    for target in TARGETS.keys() - {"moesaic", "dense"}:
        assert "experts of different widths" in reasons(split, target)


def test_an_unknown_target_is_refused_with_the_names(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="glm4_moe"):
        choose_target(split_for(tiny("llama"), {}), "deepseek")


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("gemma1", "GELU"),
        ("gemma2", "soft-capped"),
        ("gemma3", "RoPE"),
        ("smollm3", "rotary"),
        ("gpt2", "gate"),
        ("opt", "gate"),
        ("mixtral", "experts inside experts"),
    ],
)
def test_families_that_no_stock_architecture_holds(family: str, text: str, tiny: Tiny) -> None:
    split = split_for(tiny(family), {})
    for target in set(TARGETS) - {"moesaic", "dense"}:
        assert text in reasons(split, target)


def test_ffn_biases_fit_nowhere(tiny: Tiny) -> None:
    assert "mlp_bias" in reasons(split_for(tiny("llama_bias"), {}), "ernie4_5_moe")


def test_a_gated_router_is_refused_and_the_linear_one_named(tiny: Tiny) -> None:
    router = Router("gated", {"up": torch.randn(4, 32), "gate": torch.randn(4, 32)})
    split = changed(tiny("llama"), router=router)
    assert "model.layers.0.mlp and 1 more: router of kind 'gated'" in reasons(split, "glm4_moe")
    assert "--router oracle" in reasons(split, "glm4_moe")
    assert choose_target(split).name == "moesaic"


def test_trained_gate_scales_fit_nowhere_but_zeros_are_weights_of_one(tiny: Tiny) -> None:
    trained = changed(tiny("llama"), gate="scaled", gate_scale=torch.tensor([0.0, 0, 0.1, 0]))
    assert "1 + p s" in reasons(trained, "glm4_moe")
    assert choose_target(trained).name == "moesaic"
    untrained = changed(tiny("llama"), gate="scaled", gate_scale=torch.zeros(4))
    assert choose_target(untrained).name == "glm4_moe"


def test_a_selection_bias_that_decides_is_refused_and_one_that_does_not_is_ignored(tiny: Tiny) -> None:
    deciding = changed(tiny("llama"), selection_bias=torch.tensor([0.2, 0, 0, 0]))
    assert "softmax of the scores" in reasons(deciding, "glm4_moe")
    assert "softmax of the scores" in reasons(deciding, "ernie4_5_moe")  # top-2 with weights of 1
    assert reasons(replace_gate(deciding, "softmax_topk"), "ernie4_5_moe") == ""
    assert reasons(changed(tiny("llama"), selection_bias=torch.full((4,), 0.2)), "glm4_moe") == ""


def replace_gate(split: Split, gate: Any) -> Split:
    return replace(split, plans={path: replace(plan, gate=gate) for path, plan in split.plans.items()})


def test_router_bias_fits_glm4_moe_only(tiny: Tiny) -> None:
    split = changed(tiny("llama"), router=Router("linear", {"weight": torch.randn(4, 32), "bias": torch.randn(4)}))
    fits = [name for name in TARGETS if name != "moesaic" and not reasons(split, name)]
    assert fits == ["glm4_moe"]
    assert "the router has a bias: glm4_moe" in reasons(split, "mixtral")


def test_a_router_on_normalised_inputs_fits_where_only_its_ranking_counts(tiny: Tiny) -> None:
    router = Router("linear", {"weight": torch.randn(4, 32)}, normalise_input=True)
    assert reasons(changed(tiny("llama"), router=router), "glm4_moe") == ""
    assert "normalised inputs" in reasons(changed(tiny("llama"), router=router, gate="softmax_topk"), "mixtral")


def test_an_output_bias_fits_ernie_only(tiny: Tiny) -> None:
    split = changed(tiny("llama"), bias=torch.randn(32))
    assert "ernie4_5_moe" in reasons(split, "glm4_moe")
    assert reasons(split, "ernie4_5_moe") == ""
    assert "moesaic" in reasons(changed(tiny("llama"), bias=torch.randn(32)), "dense")


def test_dense_layers_and_unequal_layers_are_named(tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "m", num_hidden_layers=3)
    plans = plans_for(folder)
    middle = split_for(folder, {path: plan for path, plan in plans.items() if ".1." not in path})
    assert "layers 1 stay dense" in reasons(middle, "glm4_moe")
    assert "layers 1 stay dense" in reasons(middle, "mixtral")
    assert choose_target(middle).name == "qwen2_moe"
    unequal = split_for(folder, {**plans, "model.layers.2.mlp": plan_of(37, 32, "S1A1E4")})
    assert "top-1 of 3, top-2 of 4" in reasons(unequal, "granitemoeshared")
    assert reasons(unequal, "glm4_moe") == ""


def test_nothing_but_the_backbone_is_judged_before_plans_exist(tiny: Tiny) -> None:
    assert reasons(split_for(tiny("llama"), {}), "glm4_moe") == ""
    assert "biases" in reasons(split_for(tiny("qwen2"), {}), "mixtral")


def test_a_model_without_routed_experts_is_dense(tiny: Tiny) -> None:
    plans = dict.fromkeys(plans_for(tiny("llama")), LayerPlan(37, torch.arange(20)))
    split = split_for(tiny("llama"), plans)
    assert "target dense" in reasons(split, "glm4_moe")
    assert choose_target(split).name == "dense"


def test_listing_the_targets_loads_no_torch() -> None:
    code = "import sys, moesaic.targets; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
