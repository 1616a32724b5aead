"""Every dense family in every stock architecture that holds it: stock transformers computes what the blueprint says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.targets import TARGETS, get_target
from moesaic.targets.backbone import read_backbone
from moesaic.targets.base import TargetOptions
from tests.targets.helpers import Run, plan_of, plans_for, relative, run_reference, run_stock, split_for, write
from tests.tiny_models import TINY, build_tiny

STOCK = [name for name, target in TARGETS.items() if target.stock]
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 8.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [4.0, 5.0, 6.0]}
# name -> (tiny family, config, targets that hold it)
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    **{name: (name, {}, tiny.targets) for name, tiny in TINY.items() if tiny.targets},
    "llama3-rope": (
        "llama",
        {"rope_parameters": {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        TINY["llama"].targets,
    ),
    "llama-attention-bias": ("llama", {"attention_bias": True}, ("granitemoeshared", "ernie4_5_moe")),
    "mistral-window": ("mistral", {"sliding_window": 8}, ("mixtral",)),
    "mistral-wide-heads": ("mistral", {"head_dim": 16}, ("glm4_moe", "mixtral", "ernie4_5_moe")),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {**ROPE, "rope_type": "yarn"}}, TINY["qwen2"].targets),
    "qwen3": ("qwen3", {"attention_bias": False}, ("glm4_moe", "qwen3_moe")),
    "qwen3-attention-bias": ("qwen3", {}, TINY["qwen3"].targets),
    "cwm": ("cwm", {"layer_types": ["full_attention"] * 2, "mlp_bias": False}, TINY["llama"].targets),
    "phi3-partial-longrope": (
        "phi3",
        {"partial_rotary_factor": 0.75, "rope_parameters": LONG, "original_max_position_embeddings": 16},
        ("glm4_moe",),
    ),
}
PAIRS = [(case, target) for case, (_, _, targets) in CASES.items() for target in targets]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``dense("mistral-window")``: the tiny dense model of a case."""
    built: dict[tuple[str, str], Path] = {}

    def folder_of(case: str, dtype: str = "bfloat16") -> Path:
        if (case, dtype) not in built:
            family, config, _ = CASES[case]
            built[case, dtype] = build_tiny(family, tmp_path_factory.mktemp(case) / "model", dtype=dtype, **config)
        return built[case, dtype]

    return folder_of


@pytest.fixture(scope="session")
def reference() -> Any:
    """Logits of the oracle, once per case and kind of plan."""
    known: dict[tuple[Path, str], Run] = {}

    def run(folder: Path, key: str, plans: dict[str, LayerPlan]) -> Run:
        if (folder, key) not in known:
            known[folder, key] = run_reference(folder, plans)
        return known[folder, key]

    return run


@pytest.mark.parametrize("case", CASES)
def test_each_family_fits_exactly_the_targets_of_the_matrix(case: str, dense: Any) -> None:
    split = split_for(dense(case), plans_for(dense(case)))
    fits = {target for target in STOCK if not get_target(target).reasons(split)}
    assert fits == set(CASES[case][2])


def test_switches_of_other_families_are_ignored_as_transformers_does(dense: Any) -> None:
    anatomy = split_for(dense("mistral"), {}).anatomy
    stray = {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.5}
    assert vars(read_backbone(replace(anatomy, config={**anatomy.config, **stray}))) == {
        **vars(read_backbone(anatomy)),
        "config": ANY,
    }


@pytest.mark.parametrize(("case", "target"), PAIRS)
def test_exact_weights_give_the_reference_logits(
    case: str, target: str, dense: Any, reference: Any, tmp_path: Path
) -> None:
    limits = TARGETS[target].limits
    assert limits is not None
    softmax = limits.softmax_topk
    layout, fields = ("S2A2E6", {"gate": "softmax_topk"}) if softmax else ("S2A2E6", {"router": "static"})
    plans = plans_for(dense(case), layout, **fields)
    assert get_target(target).exact(split_for(dense(case), plans), TargetOptions())
    run = run_stock(write(dense(case), plans, tmp_path / "out", target))
    expected = reference(dense(case), str(fields), plans)
    assert relative(run, expected) <= 2e-6
    if softmax:
        assert run.chosen == expected.chosen


@pytest.mark.parametrize("target", STOCK)
def test_weights_of_one_are_within_eps_and_choose_the_same_experts(
    target: str, dense: Any, reference: Any, tmp_path: Path
) -> None:
    case = next(case for case, (_, _, targets) in CASES.items() if target in targets)
    plans = plans_for(dense(case))
    split = split_for(dense(case), plans)
    assert not get_target(target).exact(split, TargetOptions(exact_weights=False))
    expected = reference(dense(case), "uniform", plans)
    near = run_stock(write(dense(case), plans, tmp_path / "near", target, TargetOptions(eps=1e-3, exact_weights=False)))
    far = run_stock(write(dense(case), plans, tmp_path / "far", target, TargetOptions(eps=4e-3, exact_weights=False)))
    assert near.chosen == expected.chosen
    assert 1e-6 < relative(near, expected) <= 2e-3
    assert relative(far, expected) > 2 * relative(near, expected)  # the error is that of eps, nothing else


@pytest.mark.parametrize("target", ["glm4_moe", "granitemoeshared", "mixtral", "ernie4_5_moe"])
def test_top1_has_weight_one_exactly(target: str, dense: Any, reference: Any, tmp_path: Path) -> None:
    plans = plans_for(dense("llama"), "S2A1E6")
    run = run_stock(write(dense("llama"), plans, tmp_path / "out", target))
    expected = reference(dense("llama"), "top1", plans)
    assert relative(run, expected) <= 2e-6
    assert run.chosen == expected.chosen


@pytest.mark.parametrize("target", ["glm4_moe", "granitemoeshared", "qwen2_moe", "mixtral", "ernie4_5_moe"])
def test_no_shared_expert(target: str, dense: Any, reference: Any, tmp_path: Path) -> None:
    source = dense("llama", "float32")  # some of these targets store 5 times the down projections
    plans = plans_for(source, "S0A2E5", router="static")
    run = run_stock(write(source, plans, tmp_path / "out", target))
    assert relative(run, reference(source, "no shared", plans)) <= 2e-6


def unequal(paths: list[str]) -> dict[str, LayerPlan]:
    layouts = [("S1A3E6", "linear"), ("S2A1E9", "linear"), ("S0A2E4", "static"), ("S2A2E4", "linear")]
    return {
        path: plan_of(37, 32, layout, router=router, seed=seed)
        for seed, (path, (layout, router)) in enumerate(zip(paths, layouts, strict=False))
    }


@pytest.mark.parametrize(("family", "exact_weights"), [("qwen2", False), ("qwen2", True), ("glm", True)])
def test_glm4_moe_holds_layers_that_differ_and_leading_dense_ones(
    family: str, exact_weights: bool, tmp_path: Path
) -> None:
    folder = build_tiny(family, tmp_path / "dense", num_hidden_layers=5)
    plans = unequal([f"model.layers.{layer}.mlp" for layer in range(1, 5)])
    options = TargetOptions(exact_weights=exact_weights)
    run = run_stock(write(folder, plans, tmp_path / "out", "glm4_moe", options))
    assert relative(run, run_reference(folder, plans)) <= (2e-6 if exact_weights else 2e-3)


@pytest.mark.parametrize("with_bias", [False, True])
def test_paired_experts_have_weights_of_exactly_one(with_bias: bool, dense: Any, tmp_path: Path) -> None:
    plans = plans_for(dense("llama"), "S2A3E8")
    if with_bias:
        generator = torch.Generator().manual_seed(0)
        plans = {
            path: replace(
                plan, router=Router("linear", {**plan.router.tensors, "bias": torch.randn(6, generator=generator)})
            )
            for path, plan in plans.items()
        }
    out = write(dense("llama"), plans, tmp_path / "out", "glm4_moe", TargetOptions(exact_weights=True))
    run, expected = run_stock(out), run_reference(dense("llama"), plans)
    assert relative(run, expected) <= 2e-6
    # expert e of the plan is expert 2 e of the file; its twin 2 e + 1 is never chosen
    assert run.chosen == [[frozenset(2 * e for e in experts) for experts in layer] for layer in expected.chosen]


def with_sigmoid(plans: dict[str, LayerPlan], *, biased: bool) -> dict[str, LayerPlan]:
    """The plans with weights 2 sigmoid(z), and selection biases beyond the range of the scores."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for path, plan in plans.items():
        bias_E = 0.4 * torch.randn(len(plan.experts), generator=generator) - 1 if biased else None
        made[path] = replace(plan, gate="sigmoid", selection_bias=bias_E)
    return made


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", ["S2A1E6", "S2A2E6", "S0A3E8"])
def test_sigmoid_weights_are_glm4_moes_own(layout: str, biased: bool, dense: Any, tmp_path: Path) -> None:
    plans = with_sigmoid(plans_for(dense("llama"), layout), biased=biased)
    split = split_for(dense("llama"), plans)
    for exact_weights in (False, True):
        assert get_target("glm4_moe").exact(split, TargetOptions(exact_weights=exact_weights))
    run = run_stock(out := write(dense("llama"), plans, tmp_path / "out", "glm4_moe"))
    expected = run_reference(dense("llama"), plans)
    assert run.chosen == expected.chosen
    assert relative(run, expected) <= 2e-6
    assert relative(run, run_reference(dense("llama"), plans_for(dense("llama"), layout))) > 1e-3
    config = json.loads((out / "config.json").read_text())
    assert (config["norm_topk_prob"], config["routed_scaling_factor"], config["n_group"]) == (False, 2.0, 1)


@pytest.mark.parametrize("exact_weights", [False, True])
def test_sigmoid_layers_stand_beside_others(exact_weights: bool, tmp_path: Path) -> None:
    folder = build_tiny("qwen2", tmp_path / "dense", num_hidden_layers=5)
    plans = unequal([f"model.layers.{layer}.mlp" for layer in range(1, 5)])
    routed = {path: plan for path, plan in plans.items() if plan.router.kind != "static"}
    one, *_ = with_sigmoid(routed, biased=True).items()
    plans[one[0]] = one[1]
    options = TargetOptions(exact_weights=exact_weights)
    run = run_stock(write(folder, plans, tmp_path / "out", "glm4_moe", options))
    assert relative(run, run_reference(folder, plans)) <= (2e-6 if exact_weights else 2e-3)


@pytest.mark.parametrize("biased", [False, True])
def test_sigmoid_weights_are_refused_elsewhere(biased: bool, dense: Any) -> None:
    split = split_for(dense("llama"), with_sigmoid(plans_for(dense("llama")), biased=biased))
    reasons = {target: get_target(target).reasons(split) for target in STOCK}
    assert {target for target, found in reasons.items() if not found} == {"glm4_moe"}
    for target in ("granitemoeshared", "qwen2_moe", "mixtral", "ernie4_5_moe"):
        assert any("gate 'sigmoid': glm4_moe" in reason for reason in reasons[target])


def test_a_router_bias_under_sigmoid_is_refused(dense: Any) -> None:
    plans = {
        path: replace(plan, router=Router("linear", {**plan.router.tensors, "bias": torch.ones(4)}))
        for path, plan in with_sigmoid(plans_for(dense("llama")), biased=False).items()
    }
    (reason,) = get_target("glm4_moe").reasons(split_for(dense("llama"), plans))
    assert "the router has a bias" in reason


def test_router_bias_is_added_when_choosing(dense: Any, tmp_path: Path) -> None:
    plans = {
        path: replace(plan, router=Router("linear", {**plan.router.tensors, "bias": torch.tensor([2.0, 0, -1, 1])}))
        for path, plan in plans_for(dense("llama")).items()
    }
    options = TargetOptions(exact_weights=False)
    run = run_stock(write(dense("llama"), plans, tmp_path / "out", "glm4_moe", options))
    expected = run_reference(dense("llama"), plans)
    assert run.chosen == expected.chosen
    assert relative(run, expected) <= 2e-3


@pytest.mark.parametrize("target", ["qwen2_moe", "qwen3_moe"])
def test_dense_layers_in_the_middle(target: str, tmp_path: Path) -> None:
    family, config = ("llama", {}) if target == "qwen2_moe" else ("qwen3", {})
    folder = build_tiny(family, tmp_path / "dense", num_hidden_layers=3, **config)
    plans = plans_for(folder, router="static")
    pruned = LayerPlan(37, torch.arange(0, 37, 2))
    plans = {"model.layers.0.mlp": pruned, "model.layers.2.mlp": plans["model.layers.2.mlp"]}
    run = run_stock(write(folder, plans, tmp_path / "out", target))
    assert relative(run, run_reference(folder, plans)) <= 2e-6


@pytest.mark.parametrize(("gate", "layout"), [("softmax_topk", "S2A2E6"), ("uniform", "S2A1E6")])
def test_selection_bias_and_output_bias_in_ernie(gate: Any, layout: str, dense: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    plans = {
        path: replace(plan, selection_bias=torch.tensor([0.3, 0, -0.2, 0.1]), bias=torch.randn(32, generator=generator))
        for path, plan in plans_for(dense("llama"), layout, gate=gate).items()
    }
    run = run_stock(write(dense("llama"), plans, tmp_path / "out", "ernie4_5_moe"))
    expected = run_reference(dense("llama"), plans)
    assert run.chosen == expected.chosen
    assert relative(run, expected) <= 2e-6


@pytest.mark.parametrize(
    "family", ["llama", "llama_bias", "qwen3", "phi3", "gemma3", "olmo2", "gpt2", "opt", "gpt_neox", "phi"]
)
def test_dense_target_holds_pruned_and_static_ffns_of_any_family(family: str, tmp_path: Path) -> None:
    folder = build_tiny(family, tmp_path / "dense")
    first, *others = plans_for(folder, "S1A3E5", router="static").items()
    path, plan = others[0] if others else first
    plans = {first[0]: LayerPlan(37, torch.tensor([5, 3, -1, 30])), path: replace(plan, shared=plan.shared[:2])}
    run = run_stock(write(folder, plans, tmp_path / "out", "dense"))
    assert relative(run, run_reference(folder, plans)) <= 2e-6
