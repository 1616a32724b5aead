"""The oracle itself, on cases small enough for a head."""

from __future__ import annotations

import pytest
import torch

from moesaic.blueprint.layer import LayerPlan, Router, WeightFade
from moesaic.nn.ffn import FFNWeights, activation_function, combine
from moesaic.nn.moesaic_activation import build_activation, gated
from moesaic.nn.moesaic_path_rows import Rows
from moesaic.nn.moesaic_union import build_feed_forward
from moesaic.nn.reference import choose, reference_ffn

IDENTITY = FFNWeights(torch.eye(4), torch.eye(4), "relu")  # y = relu(x)


def plan(**changes: object) -> LayerPlan:
    pairs = {
        "d_ff": 4,
        "shared": torch.tensor([0]),
        "experts": (torch.tensor([1]), torch.tensor([2]), torch.tensor([3])),
        "top_k": 1,
        "router": Router("linear", {"weight": torch.eye(4)[1:]}),
    }
    return LayerPlan(**{**pairs, **changes})  # type: ignore[arg-type]


def test_one_expert_of_three_answers() -> None:
    x_TD = torch.tensor([[5.0, 1, 2, 3], [5, 3, 2, 1]])
    assert reference_ffn(IDENTITY, plan(), x_TD).tolist() == [[5, 0, 0, 3], [5, 3, 0, 0]]
    assert reference_ffn(IDENTITY, plan(), x_TD, all_experts_on=True).tolist() == x_TD.tolist()
    assert reference_ffn(IDENTITY, plan(), x_TD[:0]).shape == (0, 4)


def test_selection_bias_chooses_but_does_not_weigh() -> None:
    x_D = torch.tensor([5.0, 1, 2, 3])
    biased = plan(selection_bias=torch.tensor([1.0, 0, 0]), gate="scaled", gate_scale=torch.tensor([10.0, 0, 0]))
    [(expert, weight)] = choose(IDENTITY, biased, x_D)
    assert expert == 0
    assert float(weight) == pytest.approx(1 + 10 * float(torch.softmax(torch.tensor([1.0, 2, 3]), 0)[0]))


def test_softmax_topk_weights_average_to_one() -> None:
    chosen = choose(IDENTITY, plan(top_k=2, gate="softmax_topk"), torch.tensor([5.0, 1, 2, 2]))
    assert [e for e, _ in chosen] == [1, 2]
    assert [float(w) for _, w in chosen] == [1, 1]


def test_gated_router_scores_are_absolute() -> None:
    router = Router("gated", {"up": -torch.eye(4)[1:], "gate": torch.eye(4)[1:]})
    assert choose(IDENTITY, plan(router=router), torch.tensor([0.0, -3, 1, 2]))[0][0] == 2  # relu silences the first


def test_replacements_of_readout_bias_and_scale() -> None:
    x_TD = torch.tensor([[5.0, 1, 2, 3]])
    scale = torch.tensor([[1.0] * 4, [1.0] * 4, [2.0] * 4])
    changed = plan(readout=3 * torch.eye(4), expert_scale=scale, bias=torch.full((4,), 0.5))
    assert reference_ffn(IDENTITY, changed, x_TD).tolist() == [[15.5, 0.5, 0.5, 18.5]]


@pytest.mark.parametrize("scope", ["matrix", "row", "branch"])
def test_fade_drops_the_smallest_weights_of_an_expert_and_never_padding(scope: str) -> None:
    # One expert of two neurons and a padding one, D = 2: up [[1, 2], [3, 1]], down [[9, 8], [5, 4]].
    weights = FFNWeights(torch.tensor([[1.0, 2], [3, 1]]), torch.tensor([[9.0, 8], [5, 4]]), "relu")
    faded = LayerPlan(
        2,
        torch.arange(0),
        (torch.tensor([0, 1, -1]),),
        1,
        Router("linear", {"weight": torch.zeros(1, 2)}),
        fade=WeightFade((0.5,) if scope != "branch" else (0.25,), scope),  # type: ignore[arg-type]
    )
    e0, e1 = reference_ffn(weights, faded, torch.eye(2)).tolist()
    expected = {
        # half of each matrix: up keeps 2, 3; down keeps 9, 8
        "matrix": ([3 * 8.0, 0], [2 * 9.0, 0]),
        # half of each row: up keeps 2 and 3; down keeps 9 and 5
        "row": ([0, 0], [2 * 9.0, 2 * 5.0]),
        # two of eight: both 1s go
        "branch": ([3 * 8.0, 3 * 4.0], [2 * 9.0, 2 * 5.0]),
    }[scope]
    assert (e0, e1) == expected


@pytest.mark.parametrize("name", ["silu(0.7,0.3)", "gelu_new(2.0,1.5)", "xielu", "clamped(1.702,0.5)"])
def test_an_activation_with_constants_or_tensors_is_the_runtime_s(name: str) -> None:
    """The oracle's functions and the runtime's modules are written apart; of xIELU the module is transformers'."""
    module = build_activation(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    x, up = torch.linspace(-6, 6, 97), torch.linspace(3, -3, 97)
    act = activation_function(name, module.state_dict())
    assert torch.allclose(act(x), module(x), atol=1e-6)
    assert torch.allclose(combine(name, act, x, up), gated(module, x, up), atol=1e-6)


def test_constants_stand_where_falcon_h1_has_them() -> None:
    gate, up = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    h = combine("silu(0.7,0.3)", activation_function("silu(0.7,0.3)"), gate, up)
    assert torch.allclose(h, 0.3 * (up * torch.nn.functional.silu(gate * 0.7)))


def test_no_kernel_computes_an_activation_that_is_more_than_a_name() -> None:
    spec = {"shared": 4, "experts": 2, "expert_width": 4, "neurons": 12, "top_k": 1, "gate": "uniform", "gated": True}
    spec |= {"router": "static", "selection_bias": False, "gate_bias": False, "up_bias": False, "down_bias": False}
    with torch.inference_mode():
        for name in ("silu(0.7,0.3)", "clamped(1.7,7.0)", "xielu"):
            assert not Rows("packed").supports(torch.randn(1, 8), build_feed_forward(spec, 8, name).eval())
