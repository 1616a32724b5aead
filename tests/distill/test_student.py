"""The gathered student is the dense one, and the student is what the specification says, token by token.

Axes: T tokens, D model width, E experts, K active experts.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moesaic.distill.gathered import Incidence, combine, dots
from moesaic.distill.search import top_k, top_k_pairs
from moesaic.distill.spec import StudentSpec, costs
from moesaic.distill.student import FullRouter, LowRankRouter, MoEStudent, make_student
from moesaic.errors import InputError

D = 12


def student(**fields: object) -> MoEStudent:
    spec = StudentSpec.model_validate({"shared": 3, "experts": 60, "top_k": 4, "rank": 4, **fields})
    made = make_student(spec, D, seed=1)
    assert isinstance(made, MoEStudent)
    return made.double()


def inputs(tokens: int = 9, seed: int = 0) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VARIANTS = [
    {"router": "full", "init": "fan_in"},
    {"router": "low_rank"},
    {"router": "product"},
    {"router": "low_rank", "width": 3},
    {"router": "full", "shared": 0},
    {"router": "low_rank", "top_k": 60},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_gathered_equals_dense_in_output_and_every_gradient(fields: dict[str, object]) -> None:
    model, x_TD = student(**fields), inputs()
    found = {}
    for name, forward in {"gathered": model.forward, "dense": model.dense_forward}.items():
        model.zero_grad()
        x = x_TD.clone().requires_grad_()
        y = forward(x)
        (y * inputs(seed=3)).sum().backward()
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        found[name] = {"y": y.detach(), "x": x.grad, **grads}
    assert found["gathered"].keys() == found["dense"].keys()
    for key, value in found["dense"].items():
        torch.testing.assert_close(found["gathered"][key], value, rtol=1e-10, atol=1e-11, msg=key)


@pytest.mark.parametrize("fields", VARIANTS[:4])
@torch.no_grad()
def test_forward_is_a_loop_over_tokens_and_chosen_neurons(fields: dict[str, object]) -> None:
    model, x_TD = student(**fields), inputs()
    spec, rows = model.spec, []
    for x_D in x_TD:
        r_E = model.router.logits(x_D[None])[0]
        chosen = sorted(range(spec.experts), key=lambda e, r=r_E: -float(r[e]))[: spec.top_k]
        total = sum(math.exp(r_E[e]) for e in chosen)
        y_D = model.bias_D.clone()
        for e in chosen:
            for n in range(e * spec.width, (e + 1) * spec.width):
                h = F.gelu(model.up_ND[n] @ x_D + model.up_bias_N[n])
                y_D += math.exp(r_E[e]) / total * h * model.down_ND[n]
        if model.shared is not None:
            y_D += model.shared(x_D[None])[0]
        rows.append(y_D)
    assert float((model(x_TD) - torch.stack(rows)).abs().max()) < 1e-10


@torch.no_grad()
def test_gates_are_a_softmax_over_the_chosen_and_blind_to_a_common_constant() -> None:
    model, x_TD = student(router="low_rank"), inputs()
    experts, gate_TK = model.gates(x_TD)
    assert bool((gate_TK > 0).all())
    assert gate_TK.shape == (9, 4)
    torch.testing.assert_close(gate_TK.sum(1), torch.ones(9, dtype=torch.float64))
    assert isinstance(model.router, LowRankRouter)
    model.router.bias_E += 5
    again, shifted_TK = model.gates(x_TD)
    assert torch.equal(again.index_TK, experts.index_TK)
    torch.testing.assert_close(shifted_TK, gate_TK)
    for factor in (model.router.weight_EP, model.router.bias_E):
        factor *= 1e-9
    flat, uniform_TK = model.gates(x_TD)
    assert torch.equal(flat.index_TK, experts.index_TK)
    torch.testing.assert_close(uniform_TK, torch.full_like(uniform_TK, 1 / 4), rtol=0, atol=1e-6)


@torch.no_grad()
def test_all_experts_under_a_zero_router_are_their_mean() -> None:
    model, x_TD = student(router="full", top_k=60), inputs()
    assert isinstance(model.router, FullRouter)
    model.router.weight_ED.zero_()
    model.router.bias_E.zero_()
    assert model.shared is not None
    mean_TD = F.gelu(F.linear(x_TD, model.up_ND, model.up_bias_N)) @ model.down_ND / 60
    torch.testing.assert_close(model(x_TD), mean_TD + model.bias_D + model.shared(x_TD))


@torch.no_grad()
def test_low_rank_with_the_identity_is_full_rank_and_its_rank_is_bounded() -> None:
    low, full = student(router="low_rank", rank=D), student(router="full", init="active")
    full.load_state_dict(low.state_dict(), strict=False)
    assert isinstance(low.router, LowRankRouter)
    assert isinstance(full.router, FullRouter)
    low.router.reduce_PD.copy_(torch.eye(D))
    full.router.weight_ED.copy_(low.router.weight_EP)
    torch.testing.assert_close(low(inputs()), full(inputs()))
    narrow = student(router="low_rank", rank=4).router
    assert isinstance(narrow, LowRankRouter)
    assert int(torch.linalg.matrix_rank(narrow.weight_EP @ narrow.reduce_PD)) == 4


@torch.no_grad()
def test_relabelling_experts_changes_nothing() -> None:
    model, x_TD = student(router="full"), inputs()
    before = model(x_TD)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert isinstance(model.router, FullRouter)
    for tensor in (model.router.weight_ED, model.router.bias_E, model.up_ND, model.up_bias_N, model.down_ND):
        tensor.copy_(tensor[order])
    torch.testing.assert_close(model(x_TD), before)


def test_experts_that_no_token_chose_get_no_gradient_and_logit_gradients_sum_to_zero() -> None:
    model, x_TD = student(router="full"), inputs(tokens=1)
    model(x_TD).square().sum().backward()
    assert isinstance(model.router, FullRouter)
    idle = torch.ones(60, dtype=torch.bool)
    idle[model.gates(x_TD)[0].index_TK[0]] = False
    for tensor in (model.up_ND, model.down_ND, model.up_bias_N, model.router.weight_ED, model.router.bias_E):
        assert tensor.grad is not None
        assert bool((tensor.grad[idle] == 0).all())
        assert bool((tensor.grad[~idle] != 0).any())
    assert model.router.bias_E.grad is not None
    assert abs(float(model.router.bias_E.grad.sum())) < 1e-12


def test_gathered_products_pass_gradcheck() -> None:
    incidence = Incidence(torch.tensor([[0, 2], [2, 3], [1, 2]]), 5)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda w, x: dots(incidence, w, x), (weight, x))
    torch.autograd.gradcheck(lambda s, w: combine(incidence, s, w), (scale, weight))


@settings(max_examples=30, deadline=None)
@given(experts=st.integers(1, 700), k=st.integers(1, 20), seed=st.integers(0, 99))
def test_two_level_search_finds_the_largest(experts: int, k: int, seed: int) -> None:
    k = min(k, experts)
    z_TE = torch.randn(5, experts, generator=torch.Generator().manual_seed(seed))
    found = z_TE.gather(1, top_k(z_TE, k)).sort(1, descending=True).values
    assert torch.equal(found, z_TE.topk(k).values)


@settings(max_examples=30, deadline=None)
@given(a=st.integers(1, 12), b=st.integers(1, 12), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_product_search_finds_the_largest_sums(a: int, b: int, k: int, seed: int) -> None:
    k = min(k, a * b)
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(4, a, generator=generator), torch.randn(4, b, generator=generator)
    sums = (left[:, :, None] + right[:, None, :]).flatten(1)
    first, second = top_k_pairs(left, right, k)
    found = sums.gather(1, first * b + second).sort(1, descending=True).values
    assert torch.equal(found, sums.topk(k).values)


@pytest.mark.parametrize("fields", [*VARIANTS, {"experts": 0, "top_k": 0, "rank": 0}])
def test_parameters_are_those_that_the_accounting_names(fields: dict[str, object]) -> None:
    spec = StudentSpec.model_validate({"shared": 3, "experts": 60, "top_k": 4, "rank": 4, **fields})
    assert sum(p.numel() for p in make_student(spec, D).parameters()) == costs(spec, D).parameters


def test_costs_are_the_papers() -> None:
    low = costs(StudentSpec(shared=128, experts=100_000, top_k=128, rank=128), 512)
    assert round(low.router_macs / 1e6, 1) == 12.9
    assert low.active == 256
    assert low.parameters == 128 * 512 + 128 * 100_000 + 100_000 + 100_000 * 1025 + 512 + 128 * 1025 + 512
    assert low.equal_dense_width(512) == 256 + low.router_macs / 1024
    product = costs(StudentSpec(shared=128, experts=100_000, top_k=128, rank=128, router="product"), 512)
    assert product.router_macs < low.router_macs / 80


@pytest.mark.parametrize("init", ["fan_in", "active"])
@pytest.mark.parametrize("router", ["full", "low_rank"])
def test_down_vectors_start_where_the_initialisation_says(router: str, init: str) -> None:
    model = student(router=router, init=init, experts=400, top_k=4)
    bound = (400 if init == "fan_in" else 4) ** -0.5
    assert 0.95 * bound < float(model.down_ND.detach().abs().max()) <= bound
    assert (float(model.bias_D.detach().abs().max()) == 0) == (init == "active")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 61}, "top-k 61 of 60 experts"),
        ({"rank": 0}, "without a rank"),
        ({"router": "product", "rank": 3}, "odd rank 3"),
        ({"router": "product", "experts": 61}, "no grid of pairs"),
        ({"experts": 0}, "routes nothing"),
    ],
)
def test_specs_that_make_no_student_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StudentSpec.model_validate({"shared": 3, "experts": 60, "top_k": 4, "rank": 4, **fields})
