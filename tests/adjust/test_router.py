"""A plan's router replaced by a fitted linear one.

Axes: T tokens, D model width, F neurons, E experts, K active experts.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moesaic.adjust.router import expert_energies, expert_networks, fit_linear_router, original_sets
from moesaic.adjust.router_config import RouterFitConfig
from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.materialise.apply import build_ffn
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.reference import reference_ffn

WIDTH, NEURONS, EXPERTS, TOKENS = 12, 37, 4, 4096


def network(seed: int = 0, biased: bool = False) -> FFNWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    biases = {name: draw(NEURONS) for name in ("gate_bias_F", "up_bias_F")} | {"down_bias_D": draw(WIDTH)}
    return FFNWeights(
        draw(NEURONS, WIDTH), draw(WIDTH, NEURONS), "silu", draw(NEURONS, WIDTH), **(biases if biased else {})
    )


def plan_of(router: Router, top_k: int = 2, **fields: object) -> LayerPlan:
    """5 shared neurons and 4 experts of 8; a last 9th neuron of each is padding."""
    experts = [torch.cat([torch.arange(5 + 8 * e, 13 + 8 * e), torch.tensor([-1])]) for e in range(EXPERTS)]
    return LayerPlan(NEURONS, torch.arange(5), tuple(experts), top_k, router, **fields)


def linear_router(seed: int = 5) -> Router:
    generator = torch.Generator().manual_seed(seed)
    return Router("linear", {"weight": torch.randn(EXPERTS, WIDTH, generator=generator)})


def gated_router(weights: FFNWeights) -> Router:
    assert weights.gate_FD is not None
    rows = [5, 13, 21, 29]
    return Router("gated", {"up": weights.up_FD[rows], "gate": weights.gate_FD[rows]})


def inputs_of(tokens: int = TOKENS, seed: int = 9, dtype: torch.dtype = torch.float32) -> SiteInputs:
    return SiteInputs(torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype))


def test_decisions_of_a_linear_router_are_reproduced() -> None:
    weights, plan = network(), plan_of(linear_router())
    config = RouterFitConfig(mode="decisions", steps=100)
    fitted, report = fit_linear_router(plan, weights, inputs_of(), config)
    assert report.agreement > 0.99
    fresh = inputs_of(seed=77)
    same = (original_sets(weights, fitted, fresh) * original_sets(weights, plan, fresh)).sum() / (2 * TOKENS)
    assert same > 0.99


def test_only_router_and_gate_change() -> None:
    weights = network()
    plan = plan_of(
        gated_router(weights), gate="scaled", selection_bias=torch.rand(EXPERTS), gate_scale=torch.zeros(EXPERTS)
    )
    fitted, _ = fit_linear_router(plan, weights, inputs_of(512), RouterFitConfig())
    assert fitted.router.kind == "linear"
    assert set(fitted.router.tensors) == {"weight"}
    assert fitted.router.tensors["weight"].shape == (EXPERTS, WIDTH)
    assert fitted.gate == "uniform"
    assert fitted.selection_bias is None
    assert fitted.gate_scale is None
    restored = replace(
        fitted,
        router=plan.router,
        gate=plan.gate,
        selection_bias=plan.selection_bias,
        gate_scale=plan.gate_scale,
    )
    assert restored == plan
    x_TD = inputs_of(16).x_TD
    expected_TD = reference_ffn(weights, fitted, x_TD)
    torch.testing.assert_close(build_ffn(weights, fitted)(x_TD), expected_TD, rtol=1e-4, atol=1e-5)


def test_each_mode_is_best_at_what_it_predicts() -> None:
    weights = network()
    plan = plan_of(gated_router(weights))
    _, decisions = fit_linear_router(plan, weights, inputs_of(), RouterFitConfig(mode="decisions"))
    _, oracle = fit_linear_router(plan, weights, inputs_of(), RouterFitConfig(mode="oracle"))
    assert decisions.agreement > oracle.agreement
    assert oracle.energy > max(decisions.energy, oracle.energy_random, oracle.energy_fixed)
    assert oracle.energy_oracle >= oracle.energy
    assert oracle.agreement_oracle > decisions.agreement_oracle
    for name in ("heldout", "energy_original", "energy_oracle", "energy_fixed", "original_oracle"):
        assert getattr(decisions, name) == getattr(oracle, name), name
    assert (oracle.tokens, oracle.heldout) == (3584, 512)


def test_energies_are_those_of_the_written_experts() -> None:
    weights = network(biased=True)
    generator = torch.Generator().manual_seed(3)
    changes = {
        "readout": torch.randn(WIDTH, 5 + 9 * EXPERTS, generator=generator),
        "expert_scale": torch.rand(EXPERTS, generator=generator) + 0.5,
    }
    plan = plan_of(linear_router(), top_k=1, **changes)
    x_TD = inputs_of(6).x_TD
    energy_TE = expert_energies(expert_networks(weights, plan), SiteInputs(x_TD))
    none_D = torch.zeros(WIDTH)
    for expert in range(EXPERTS):
        forced = Router("linear", {"weight": torch.zeros(EXPERTS, WIDTH), "bias": torch.eye(EXPERTS)[expert]})
        alone_TD = reference_ffn(weights, replace(plan, router=forced, bias=none_D), x_TD)
        shared = LayerPlan(NEURONS, plan.shared, bias=none_D, readout=changes["readout"][:, :5])
        alone_TD = alone_TD - reference_ffn(weights, shared, x_TD)
        torch.testing.assert_close(energy_TE[:, expert], alone_TD.square().sum(dim=1), rtol=1e-4, atol=1e-5)


def test_bias_is_offered_and_counts() -> None:
    weights = network()
    router = Router("linear", {"weight": linear_router().tensors["weight"], "bias": torch.tensor([2.0, 0, -2, 0])})
    plan = plan_of(router)
    without, poor = fit_linear_router(plan, weights, inputs_of(), RouterFitConfig(mode="decisions", steps=60))
    with_bias, good = fit_linear_router(
        plan, weights, inputs_of(), RouterFitConfig(mode="decisions", steps=60, bias=True)
    )
    assert set(without.router.tensors) == {"weight"}
    assert with_bias.router.tensors["bias"].shape == (EXPERTS,)
    assert poor.agreement < 0.95
    assert good.agreement > 0.99


def test_all_experts_active_needs_no_fit() -> None:
    weights = network()
    fitted, report = fit_linear_router(
        plan_of(gated_router(weights), top_k=4), weights, inputs_of(64), RouterFitConfig()
    )
    assert report.agreement == report.energy == 1
    assert report.iterations == 0
    x_TD = inputs_of(8).x_TD
    torch.testing.assert_close(build_ffn(weights, fitted)(x_TD), weights(x_TD), rtol=1e-4, atol=1e-5)


def test_same_inputs_give_the_same_router() -> None:
    weights = network()
    plan = plan_of(gated_router(weights))
    first, second = (fit_linear_router(plan, weights, inputs_of(1024), RouterFitConfig()) for _ in range(2))
    assert torch.equal(first[0].router.tensors["weight"], second[0].router.tensors["weight"])
    assert first[1] == second[1]


def test_bfloat16_inputs_give_about_the_same_fit() -> None:
    weights = network()
    plan = plan_of(gated_router(weights))
    _, exact = fit_linear_router(plan, weights, inputs_of(2048), RouterFitConfig())
    fitted, rough = fit_linear_router(plan, weights, inputs_of(2048, dtype=torch.bfloat16), RouterFitConfig())
    assert fitted.router.tensors["weight"].dtype == torch.float32
    assert rough.energy == pytest.approx(exact.energy, abs=0.01)


def test_few_tokens_still_fit() -> None:
    weights = network()
    fitted, report = fit_linear_router(plan_of(gated_router(weights)), weights, inputs_of(2), RouterFitConfig())
    assert (report.tokens, report.heldout) == (1, 1)
    assert torch.isfinite(fitted.router.tensors["weight"]).all()


def test_what_cannot_be_fitted_is_refused() -> None:
    weights = network()
    with pytest.raises(InputError, match="static"):
        fit_linear_router(LayerPlan(NEURONS, torch.arange(NEURONS)), weights, inputs_of(8), RouterFitConfig())
    plan = plan_of(linear_router())
    narrower = (plan.experts[0][:1], *plan.experts[1:])
    with pytest.raises(InputError, match="different widths"):
        fit_linear_router(replace(plan, experts=narrower, union=True), weights, inputs_of(8), RouterFitConfig())
    with pytest.raises(InputError, match="1 calibration tokens"):
        fit_linear_router(plan_of(linear_router()), weights, inputs_of(1), RouterFitConfig())


@pytest.mark.parametrize(
    "wrong", [{"ridge": ()}, {"ridge": (0.0,)}, {"holdout": 1.0}, {"steps": -1}, {"mode": "best"}, {"x": 1}]
)
def test_config_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RouterFitConfig(**wrong)


def test_config_needs_no_torch_and_explains_itself() -> None:
    code = "import sys, moesaic.adjust.router_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(field.description for field in RouterFitConfig.model_fields.values())


def test_all_experts_active_with_a_bias_needs_no_fit_either() -> None:
    weights = network()
    config = RouterFitConfig(bias=True)
    fitted, _ = fit_linear_router(plan_of(gated_router(weights), top_k=4), weights, inputs_of(64), config)
    assert fitted.router.tensors["bias"].shape == (EXPERTS,)
    x_TD = inputs_of(8).x_TD
    torch.testing.assert_close(build_ffn(weights, fitted)(x_TD), weights(x_TD), rtol=1e-4, atol=1e-5)


def test_experts_of_a_union_beside_shared_neurons_are_those_of_copies() -> None:
    weights = network()
    sets = tuple(torch.arange(5 + 4 * e, 21 + 4 * e) for e in range(EXPERTS))
    copies = LayerPlan(NEURONS, torch.arange(5), sets, 1, linear_router())
    once = replace(copies, union=True)
    energies = [expert_energies(expert_networks(weights, plan), inputs_of(64)) for plan in (copies, once)]
    torch.testing.assert_close(*energies)
