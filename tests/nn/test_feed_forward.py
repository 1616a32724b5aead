"""The runtime's FFN: routers and gates, gradients, what it is moved, cast, compiled and offloaded to.

Axes: T tokens, D model width, E experts, K chosen experts.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.materialise.apply import build_ffn
from moesaic.materialise.pack import pack
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.moesaic_ffn import MoEFeedForward, use_path
from moesaic.nn.moesaic_slices import GAP_ROWS
from moesaic.nn.reference import choose, reference_ffn, reference_scores
from tests.ffns import random_ffn, random_inputs, relative_error
from tests.nn.plans import EXTRAS, ROUTERS, random_plan
from tests.nn.test_paths import routed_paths

GATES = ("uniform", "scaled", "softmax_topk", "sigmoid")
ROUTED = routed_paths("packed")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_plan_computes_what_the_oracle_says(router: str, gate: str, extra: str) -> None:
    if router == "static":
        gate = "uniform"  # nothing is chosen, so nothing is weighed
    gated = not router.endswith("ungated")
    weights = random_ffn(37, 16, gated=gated, biases=True, activation="silu" if gated else "gelu_new")
    plan = random_plan(weights, "S2A2E7", router, gate, extra)
    x_TD = random_inputs(9)
    expected_TD = reference_ffn(weights, plan, x_TD)
    with torch.no_grad():
        # Routers compute in fp32: how far that rounds a weight depends on the CPU's order of sums.
        assert relative_error(build_ffn(weights, plan)(x_TD), expected_TD) < 5e-6


def test_the_default_choice_of_path_agrees_at_every_number_of_tokens() -> None:
    weights = random_ffn(64, 16, dtype=torch.float32)
    module = build_ffn(weights, random_plan(weights, "S2A2E8"))
    x_TD = random_inputs(200, dtype=torch.float32)
    with torch.no_grad():
        whole_TD = module(x_TD)
        for count in (1, 2, 3, 4, 5, 17, 63, 64, 199):
            assert relative_error(module(x_TD[:count]), whole_TD[:count]) < 1e-5


@pytest.mark.parametrize("shape", [(0, 16), (1, 0, 16), (16,), (2, 3, 16), (2, 3, 4, 16)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    weights = random_ffn(37, 16)
    for router in ("static", "linear"):
        module = build_ffn(weights, random_plan(weights, router=router))
        x = torch.randn(shape, dtype=torch.float64)
        for path in ROUTED:
            with torch.no_grad(), use_path(module, path, "every"):
                y = module(x)
            assert y.shape == x.shape
            assert y.is_contiguous()
            rows = x.reshape(-1, 16)
            expected = torch.stack([module(row[None])[0] for row in rows]) if len(rows) else rows
            torch.testing.assert_close(y.reshape(-1, 16), expected)


def test_one_expert_alone_is_its_slice_of_the_dense_network() -> None:
    weights = random_ffn(37, 16, biases=True)
    plan = random_plan(weights, "S2A2E7")
    module, x_TD = build_ffn(weights, plan), random_inputs()
    with torch.no_grad():
        for e, index in enumerate(plan.experts):
            assert relative_error(module.expert(e, x_TD), weights.take(index)(x_TD)) < 1e-12


@pytest.mark.parametrize("gated", [True, False])
def test_all_experts_on_is_the_dense_network(gated: bool) -> None:
    weights = random_ffn(37, 16, gated=gated, biases=True)
    module = build_ffn(weights, random_plan(weights, "S2A2E7", "gated_biases" if gated else "gated_ungated", "scaled"))
    x_TD = random_inputs()
    with torch.no_grad():
        routed_TD = module(x_TD)
        module.all_experts_on = True
        assert relative_error(module(x_TD), weights(x_TD)) < 1e-12
    assert relative_error(routed_TD, weights(x_TD)) > 1e-3


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("path", ROUTED)
def test_gradients_are_those_of_the_oracle(path: str, gate: str) -> None:
    weights = random_ffn(22, 8, biases=True)
    plan = random_plan(weights, "S1A2E5", "gated_biases", gate, "selection_bias")
    x_TD = random_inputs(6, 8)
    leaves = {name: t.clone().requires_grad_() for name, t in weights.tensors().items()}
    routing = {name: t.clone().requires_grad_() for name, t in plan.router.tensors.items()}
    scale_E = None if plan.gate_scale is None else plan.gate_scale.clone().requires_grad_()
    x_leaf_TD = x_TD.clone().requires_grad_()
    live = dataclasses.replace(plan, router=dataclasses.replace(plan.router, tensors=routing), gate_scale=scale_E)
    reference_ffn(FFNWeights(activation="silu", **leaves), live, x_leaf_TD).square().sum().backward()

    module = build_ffn(weights, plan).requires_grad_(True)
    x_ours_TD = x_TD.clone().requires_grad_()
    with use_path(module, path):
        module(x_ours_TD).square().sum().backward()

    def close(actual: Tensor | None, expected: Tensor | None) -> None:
        assert actual is not None
        assert expected is not None
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)  # the router is fp32

    close(x_ours_TD.grad, x_leaf_TD.grad)
    packed = plan.packed
    real = packed >= 0
    up_grad, down_grad = leaves["up_FD"].grad, leaves["down_DF"].grad
    assert up_grad is not None
    assert down_grad is not None
    assert module.up_proj.weight.grad is not None
    assert module.down_proj.weight.grad is not None
    close(module.up_proj.weight.grad[real], up_grad[packed[real]])
    close(module.down_proj.weight.grad[:, real], down_grad[:, packed[real]])
    close(module.down_proj.bias.grad, leaves["down_bias_D"].grad)
    if gate == "softmax_topk":
        assert module.router is not None
        for name, leaf in routing.items():
            close(getattr(module.router, name).grad, leaf.grad)
    if gate == "scaled":
        assert scale_E is not None
        assert module.gate_scale is not None
        close(module.gate_scale.grad, scale_E.grad)


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "static"])
@pytest.mark.parametrize("gate", GATES)
def test_route_and_scores_are_those_of_the_oracle(router: str, gate: str) -> None:
    weights = random_ffn(37, 16)
    plan = random_plan(weights, "S1A3E8", router, gate, "selection_bias")
    x_TD = random_inputs(20)
    module = build_ffn(weights, plan)
    with torch.no_grad():
        z_TE = module.scores(x_TD)
        idx_TK, weight_TK = module.route(x_TD)
    assert z_TE.dtype == weight_TK.dtype == torch.float32
    for t, x_D in enumerate(x_TD):
        torch.testing.assert_close(z_TE[t], reference_scores(weights, plan, x_D), rtol=1e-5, atol=1e-5)
        chosen = choose(weights, plan, x_D)
        assert idx_TK[t].tolist() == [e for e, _ in chosen]
        torch.testing.assert_close(weight_TK[t], torch.stack([w for _, w in chosen]), rtol=1e-5, atol=1e-5)


def test_equal_scores_choose_the_lower_index_whatever_the_batch() -> None:
    weights = random_ffn(64, 16, activation="relu")
    plan = dataclasses.replace(
        random_plan(weights, "S0A3E16"), router=Router("linear", {"weight": torch.zeros(16, 16)})
    )
    idx_TK, _ = build_ffn(weights, plan).route(random_inputs(40))
    assert (idx_TK == torch.arange(3)).all()


@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.bfloat16().cpu()]
)
def test_routing_stays_fp32_to_the_bit_when_the_module_is_cast(
    move: Callable[[MoEFeedForward], MoEFeedForward],
) -> None:
    weights = random_ffn(37, 16, dtype=torch.float32)
    plan = random_plan(weights, "S1A2E5", "gated_biases", "scaled", "selection_bias")
    module = build_ffn(weights, plan)
    before = copy.deepcopy(module.state_dict())
    module = move(module)
    after = module.state_dict()
    routing = [name for name in after if name.startswith("router.") or name in ("selection_bias", "gate_scale")]
    assert len(routing) == 6
    for name in routing:
        assert torch.equal(after[name], before[name])
    assert after["up_proj.weight"].dtype != torch.float32


def test_autocast_does_not_reach_the_router() -> None:
    weights = random_ffn(37, 16, dtype=torch.float32)
    module = build_ffn(weights, random_plan(weights))
    x_TD = random_inputs(30, dtype=torch.float32)
    expected = module.scores(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.scores(x_TD), expected)
        with torch.no_grad():
            assert module(x_TD).dtype == torch.bfloat16


def test_idle_experts_are_not_touched() -> None:
    width = GAP_ROWS + 2
    weights = random_ffn(8 * width, 16, dtype=torch.float32)
    router = Router("linear", {"weight": torch.zeros(6, 16), "bias": torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0, 0.0])})
    plan: LayerPlan = dataclasses.replace(random_plan(weights, "S2A2E8"), router=router)
    module = build_ffn(weights, plan)
    clean_TD = module(random_inputs(80, dtype=torch.float32)).detach()
    with torch.no_grad():
        for e in (0, 2, 3, 5):
            idle = slice((2 + e) * width, (3 + e) * width)
            module.up_proj.weight[idle] = torch.nan
            module.down_proj.weight[:, idle] = torch.nan
    for count, path in ((1, "masked"), (2, "masked"), (80, "sorted")):
        with use_path(module, path):
            y_TD = module(random_inputs(80, dtype=torch.float32)[:count])
        assert relative_error(y_TD.detach(), clean_TD[:count]) < 1e-5


def test_experts_narrower_than_a_gap_are_masked_for_a_single_token_too() -> None:
    weights = random_ffn(64, 16)
    plan = random_plan(weights, "S1A3E16", "gated")
    x_TD = random_inputs(6)
    with torch.no_grad():
        rows = [build_ffn(weights, plan)(x_TD[t : t + 1]) for t in range(6)]
    assert relative_error(torch.cat(rows), reference_ffn(weights, plan, x_TD)) < 1e-6


def test_it_compiles_into_one_graph() -> None:
    weights = random_ffn(37, 16, dtype=torch.float32)
    module = build_ffn(weights, random_plan(weights))
    x_TD = random_inputs(12, dtype=torch.float32)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(x_TD), module(x_TD)) < 1e-5


def test_meta_tensors_pass_through() -> None:
    weights = random_ffn(37, 16)
    plan = random_plan(weights)
    assert build_ffn(weights, plan).to("meta")(torch.empty(5, 16, dtype=torch.float64, device="meta")).shape == (5, 16)


@pytest.mark.parametrize("router", ROUTERS)
def test_weights_that_accelerate_has_offloaded_are_used(router: str) -> None:
    weights = random_ffn(37, 16, gated=not router.endswith("ungated"), biases=True)
    module = build_ffn(weights, random_plan(weights, "S0A2E7", router, "uniform", "none"))
    x_TD = random_inputs(200)
    with torch.no_grad():
        expected = [module(x_TD[:count]) for count in (1, 200)]
        cpu_offload(torch.nn.Sequential(module), execution_device=torch.device("cpu"), offload_buffers=True)
        assert module.up_proj.weight.is_meta
        for count, expected_TD in zip((1, 200), expected, strict=True):
            torch.testing.assert_close(module(x_TD[:count]), expected_TD)
    assert module.up_proj.weight.is_meta


def test_state_dict_is_what_pack_writes() -> None:
    weights = random_ffn(37, 16, biases=True)
    plan = random_plan(weights, "S1A2E5", "gated_biases", "scaled", "selection_bias")
    tensors, state = pack(weights, plan), build_ffn(weights, plan).state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)
