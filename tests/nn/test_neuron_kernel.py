"""The compiled kernel of neuron experts against the rule in float64: scores, the choice, the output.

Axes: T tokens, D model width, P neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.nn import moesaic_kernel
from moesaic.nn.ffn import activation_function
from moesaic.nn.moesaic_kernel import FLAGS, kernel
from moesaic.nn.moesaic_path_neuron_rows import Decisions, computed_neurons
from moesaic.nn.moesaic_side_by_side import lay
from tests.nn.low_bit import decoded, packed, quantised
from tests.nn.test_rows import BOUNDS, by_rule

ULP = 2.0**-24


@pytest.fixture(params=["own", "portable"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernel for this CPU, and the one that every compiler and CPU can have."""
    if request.param == "portable":
        monkeypatch.setattr(moesaic_kernel, "FLAGS", (*FLAGS, "-DPORTABLE"))
    kernel.cache_clear()
    yield request.param
    kernel.cache_clear()


def ffn_of(
    d_model: int,
    neurons: int,
    bits: int,
    group: int,
    *,
    gated: bool = True,
    biases: bool = False,
    activation: str = "silu",
    dtype: torch.dtype = torch.bfloat16,
    top_k: int | None = None,
    threshold: float | None = None,
) -> Any:
    """What the kernel's call reads of an FFN; ``decoded`` are the router's weights in float64."""
    torch.manual_seed(0)
    layers = {"gate_proj": nn.Linear(d_model, neurons, bias=biases) if gated else None}
    layers |= {"up_proj": nn.Linear(d_model, neurons, bias=biases), "down_proj": nn.Linear(neurons, d_model)}
    router: dict[str, Any] = {"bits": bits, "group": group, "decoded": {}}
    for name, layer in layers.items():
        if layer is None:
            continue
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        layer.to(dtype).requires_grad_(False)
        if name != "down_proj":
            side = name.removesuffix("_proj")
            codes_PD, scale_PG, offset_PG = quantised(layer.weight, bits, group)
            router |= {f"{side}_codes": packed(codes_PD, bits), f"{side}_scale": scale_PG, f"{side}_offset": offset_PG}
            router["decoded"][side] = decoded(codes_PD, scale_PG, offset_PG, group)
    router["norm"] = layers["down_proj"].weight.float().norm(dim=0)
    router["threshold"] = None if threshold is None else torch.tensor([threshold])
    ffn = SimpleNamespace(
        **layers,
        router=SimpleNamespace(**router),
        neurons=neurons,
        top_k=neurons // 4 if top_k is None else top_k,
        activation=activation,
        act=activation_function(activation),
    )
    lay(ffn)
    return ffn


def run(ffn: Any, x_TD: Tensor) -> tuple[Tensor, Decisions]:
    shape = len(x_TD), ffn.neurons
    found = Decisions(torch.empty(shape), torch.empty(shape, dtype=torch.bool))
    return computed_neurons(ffn, x_TD, found), found


def scores_by_rule(ffn: Any, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in float64, and how far those of the kernel may be off.

    A projection is off by what is cut from x: at most 2^-15 of the largest |x| of 128 inputs (in bf16, nothing of those
    above 2^-6 of it), times what a code stands for; and by the rounding of one fp32 addition per link of the longest
    chain, times the sum of magnitudes. The activations have slopes below 1.13 (relu2: twice its input), and are
    themselves a few ulp off.
    """
    kept, x_TD, d_model = 2.0**-6 if x_TD.dtype == torch.bfloat16 else torch.inf, x_TD.double(), x_TD.shape[1]
    most_TD = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x_TD.split(128, dim=1)], dim=1)
    cut_TD = most_TD * 1.01 * 2.0**-15 * (x_TD.abs() < kept * most_TD)
    chain = d_model / 16 + 2 * d_model / ffn.router.group + ffn.router.group + 16
    found = {}
    for side, w_PD in ffn.router.decoded.items():
        layer = getattr(ffn, f"{side}_proj")
        bias = torch.zeros(ffn.neurons) if layer.bias is None else layer.bias
        exact_TP = x_TD @ w_PD.t() + bias.double()
        offset_PD = getattr(ffn.router, f"{side}_offset").double().repeat_interleave(ffn.router.group, dim=1)
        code_PD = w_PD - offset_PD[:, :d_model]
        sizes_TP = x_TD.abs() @ (code_PD.abs() + offset_PD[:, :d_model].abs()).t() + exact_TP.abs()
        found[side] = exact_TP, cut_TD @ code_PD.abs().t() + chain * ULP * sizes_TP
    up_TP, up_off_TP = found["up"]
    inner_TP, inner_off_TP = found.get("gate", found["up"])
    slope_TP = 2 * (inner_TP.abs() + inner_off_TP) if ffn.activation == "relu2" else torch.tensor(1.13)
    h_TP, h_off_TP = ffn.act(inner_TP), slope_TP * inner_off_TP + 16 * ULP * inner_TP.abs()
    if "gate" in found:
        h_off_TP = h_off_TP * (up_TP.abs() + up_off_TP) + h_TP.abs() * up_off_TP
        h_TP = h_TP * up_TP
    norm_P = ffn.router.norm.double()
    return h_TP.abs() * norm_P, h_off_TP * norm_P + 4 * ULP * h_TP.abs() * norm_P


def check(ffn: Any, x_TD: Tensor) -> Tensor:
    """The output, after scores, choice and output were compared with the rule."""
    y_TD, found = run(ffn, x_TD)
    exact_TP, off_TP = scores_by_rule(ffn, x_TD)
    assert ((found.scores_TP - exact_TP).abs() <= off_TP).all()
    if ffn.router.threshold is None:
        order_TP = found.scores_TP.sort(dim=1, descending=True, stable=True).indices
        chosen_TP = torch.zeros_like(found.taken_TP).scatter(1, order_TP[:, : ffn.top_k], value=True)
        limit_T1 = exact_TP.sort(dim=1, descending=True).values[:, ffn.top_k - 1, None]
        nearness_TP = off_TP + off_TP.amax(1, keepdim=True)  # the limit is one of the scores
    else:
        chosen_TP = found.scores_TP >= ffn.router.threshold
        limit_T1, nearness_TP = ffn.router.threshold.double(), off_TP
    assert torch.equal(found.taken_TP, chosen_TP)
    clear_TP = (exact_TP - limit_T1).abs() > nearness_TP
    assert torch.equal(found.taken_TP[clear_TP], (exact_TP >= limit_T1)[clear_TP])
    assert clear_TP.float().mean() > 0.85
    expected_TD = by_rule(ffn, x_TD, found.taken_TP.double())
    assert (y_TD - expected_TD).norm() <= BOUNDS[x_TD.dtype] * expected_TD.norm()
    return y_TD


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(
    ("d_model", "group", "gated", "biases", "activation"),
    [
        (40, 32, True, False, "silu"),
        (64, 128, False, True, "gelu"),
        (97, 64, True, True, "gelu_new"),
        (192, 128, False, False, "relu2"),
        (576, 64, True, False, "silu"),
        (896, 32, True, True, "relu"),
        (2240, 128, True, False, "silu"),
    ],
)
def test_scores_choice_and_output_follow_the_rule(
    d_model: int, group: int, gated: bool, biases: bool, activation: str, bits: int, form: str
) -> None:
    ffn = ffn_of(d_model, 150, bits, group, gated=gated, biases=biases, activation=activation)
    for tokens in (1, 2, 3, 4, 5, 8):
        check(ffn, torch.randn(tokens, d_model).bfloat16())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_dtype_and_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    ffn, x_TD = ffn_of(160, 1000, 4, 64, dtype=dtype), torch.randn(3, 160).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y_TD = check(ffn, x_TD)
        assert torch.equal(y_TD, run(ffn, x_TD)[0])
        shares = [
            (run(ffn, row[None])[1].taken_TP != own).float().mean()
            for row, own in zip(x_TD, run(ffn, x_TD)[1].taken_TP, strict=True)
        ]
        assert max(shares) == 0  # a token's choice is its own, whoever is beside it
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("top_k", [1, 7, 149, 150])
def test_every_number_of_neurons_can_be_chosen(top_k: int, form: str) -> None:
    ffn, x_TD = ffn_of(96, 150, 4, 32, top_k=top_k), torch.randn(2, 96).bfloat16()
    check(ffn, x_TD)
    assert run(ffn, x_TD)[1].taken_TP.sum(1).tolist() == [top_k] * 2


def test_of_equal_scores_the_first_are_taken(form: str) -> None:
    ffn = ffn_of(64, 100, 4, 64, top_k=30)
    for name in ("gate_codes", "gate_scale", "gate_offset", "up_codes", "up_scale", "up_offset", "norm"):
        tensor = getattr(ffn.router, name)
        tensor[20:90] = tensor[20].clone()
    ffn.router.norm[20:90] = ffn.router.norm[20] = 1e3
    _, found = run(ffn, torch.randn(1, 64).bfloat16())
    assert found.taken_TP[0].nonzero().flatten().tolist() == list(range(20, 50))
    _, nothing = run(ffn, torch.zeros(1, 64).bfloat16())
    assert nothing.taken_TP[0].nonzero().flatten().tolist() == list(range(30))


@pytest.mark.parametrize("threshold", [0.0, 0.1, 1e9])
def test_a_threshold_takes_all_scores_that_reach_it(threshold: float, form: str) -> None:
    ffn, x_TD = ffn_of(96, 150, 3, 64, threshold=threshold), torch.randn(3, 96).bfloat16()
    y_TD = check(ffn, x_TD)
    share = run(ffn, x_TD)[1].taken_TP.float().mean()
    assert share == 1 if threshold == 0 else share == 0 if threshold > 1 else 0 < share < 1
    if threshold > 1:
        assert not y_TD.any()


def test_inputs_of_any_size_are_scored(form: str) -> None:
    """Outliers beside small inputs, tiny and huge ones; where an input is no number, no score is."""
    ffn = ffn_of(320, 80, 4, 64, dtype=torch.float32)
    x_TD = torch.randn(6, 320)
    x_TD[0, 3] = 1e4
    x_TD[1] *= 1e-12
    x_TD[2] *= 1e12
    x_TD[3, ::2] = 0
    exact_TP, off_TP = scores_by_rule(ffn, x_TD)
    found = run(ffn, x_TD)[1]
    assert ((found.scores_TP - exact_TP).abs() <= off_TP).all()
    x_TD[:, 200] = torch.tensor([torch.nan, torch.inf] * 3)
    y_TD, found = run(ffn, x_TD)
    assert not found.scores_TP.isfinite().any()
    assert found.taken_TP.sum(1).tolist() == [20] * 6
    assert not y_TD.isfinite().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, r"^the router's gate_codes is"),
        ({"group": 16}, r"^the router's gate_scale is"),
        ({"group": 96}, r"^a router has 2, 3 or 4 bits and groups of 32, 64 or 128$"),
        ({"up_codes": torch.zeros(80, 31, dtype=torch.uint8)}, r"^the router's up_codes is \(80, 31\)"),
        ({"gate_scale": torch.zeros(80, 1)}, r"^the router's gate_scale is \(80, 1\) in torch.float32, not"),
        ({"norm": torch.zeros(79)}, r"^the router's norm is \(79,\)"),
        ({"threshold": torch.zeros(2)}, r"^the router's threshold is \(2,\)"),
    ],
)
def test_a_router_of_other_sizes_is_an_error(change: dict[str, Any], message: str) -> None:
    ffn, x_TD = ffn_of(64, 80, 4, 64), torch.randn(1, 64).bfloat16()
    vars(ffn.router).update(change)
    with pytest.raises(ValueError, match=message):
        computed_neurons(ffn, x_TD)


@pytest.mark.parametrize("top_k", [0, 81, -1])
def test_a_number_of_neurons_that_there_is_not_is_an_error(top_k: int) -> None:
    ffn = ffn_of(64, 80, 4, 64, top_k=top_k)
    with pytest.raises(ValueError, match=r"^the number of neurons to choose is not between 1 and all$"):
        computed_neurons(ffn, torch.randn(1, 64).bfloat16())
    with pytest.raises(ValueError, match=r"^inputs of width 32 for an FFN of width 64$"):
        computed_neurons(ffn, torch.randn(1, 32).bfloat16())
