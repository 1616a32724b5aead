"""The compiled kernel of neuron experts against the rule in float64: scores, the choice, the output.

Axes: T tokens, D model width, P neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from moesaic.blueprint.layer import LayerPlan, Router, single_neurons
from moesaic.materialise.apply import build_ffn
from moesaic.nn import moesaic_kernel, moesaic_nested
from moesaic.nn.moesaic_kernel import FLAGS, kernel
from moesaic.nn.moesaic_nested import Int8Projection, NestedFeedForward, NestedRouter
from moesaic.nn.moesaic_neurons import NeuronFeedForward
from moesaic.nn.moesaic_path_nested_rows import computed_nested, decoded_by_kernel
from moesaic.nn.moesaic_path_neuron_rows import Decisions, computed_neurons
from moesaic.nn.reference import decoded
from tests.ffns import random_ffn, random_inputs
from tests.nn.plans import neuron_plan
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
    neurons: int = 150,
    bits: int = 4,
    group: int = 64,
    *,
    active: float = 0.25,
    threshold: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    int8: bool = False,
    **options: Any,
) -> NeuronFeedForward:
    weights = random_ffn(neurons, d_model, dtype=dtype, **options)
    plan = neuron_plan(weights, bits, group, active, threshold, int8=int8)
    ffn = build_ffn(weights, plan)
    assert isinstance(ffn, NeuronFeedForward)
    ffn.requires_grad_(False)
    return ffn


def router_weights(ffn: NeuronFeedForward, part: Literal["up", "gate"]) -> Tensor:
    """The low-bit copy of a projection by the rule, [F, D]."""
    if isinstance(ffn, NestedFeedForward):
        return by_codes(ffn, getattr(ffn.low_bit, f"{part}_codes"), getattr(ffn.low_bit, f"{part}_scale"), 16, -120)
    return of_buffers(ffn, dict(ffn.low_bit.named_buffers()), part)


def of_buffers(ffn: NeuronFeedForward, buffers: dict[str, Tensor], part: Literal["up", "gate"]) -> Tensor:
    router = Router("low_bit", buffers, bits=ffn.low_bit.bits, group=ffn.low_bit.group)
    plan = LayerPlan(ffn.neurons, torch.arange(0), single_neurons(ffn.neurons), 1, router)
    return decoded(plan, part, ffn.up_proj.in_features).double()


def by_codes(ffn: NeuronFeedForward, codes_FB: Tensor, scale_FG: Tensor, times: int, plus: int) -> Tensor:
    """(times code + plus) scale of packed halves."""
    scale_FG = scale_FG.float()
    return of_buffers(ffn, {"up_codes": codes_FB, "up_scale": times * scale_FG, "up_offset": plus * scale_FG}, "up")


def dense_of(ffn: NeuronFeedForward) -> Any:
    """An FFN with the matrices that int8 codes stand for; any other FFN as it is."""
    if not isinstance(ffn, NestedFeedForward):
        return ffn
    router, d_model, layers = ffn.low_bit, ffn.up_proj.in_features, {}
    *lows, down_FP = ffn.rest.codes.split(
        [ffn.low_bit.up_codes.shape[1]] * (2 if router.gated else 1) + [-(-d_model // 64) * 64], dim=1
    )
    for part, low_FB in zip(("gate", "up") if router.gated else ("up",), lows, strict=True):
        high_FB, scale_FG = (getattr(router, f"{part}_{name}") for name in ("codes", "scale"))
        weight = by_codes(ffn, high_FB, scale_FG, 16, -128) + by_codes(ffn, low_FB.contiguous(), scale_FG, 1, 0)
        layers[f"{part}_proj"] = SimpleNamespace(weight=weight, bias=ffn.get_submodule(f"{part}_proj").bias)
    signed_FP = down_FP.int() - 256 * (down_FP.int() > 127)
    weight_FD = (signed_FP.double() * ffn.rest.scale.double().repeat_interleave(64, dim=1))[:, :d_model]
    down = SimpleNamespace(weight=weight_FD.t())
    return SimpleNamespace(**({"gate_proj": None} | layers), down_proj=down, act_fn=ffn.act_fn)


def run(ffn: NeuronFeedForward, x_TD: Tensor) -> tuple[Tensor, Decisions]:
    shape = len(x_TD), ffn.neurons
    found = Decisions(torch.empty(shape), torch.empty(shape, dtype=torch.bool))
    if isinstance(ffn, NestedFeedForward):
        return computed_nested(ffn, x_TD, found), found
    return computed_neurons(ffn, x_TD, found), found


def scores_by_rule(ffn: NeuronFeedForward, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in float64, and how far those of the kernel may be off.

    A projection is off by what is cut from x, at most 2^-22 of the largest |x| of 32 inputs (in bf16 2^-14, and nothing
    of those above 2^-6 of it), times what a code stands for; and by the rounding of one fp32 addition per link of the
    longest chain, times the sum of magnitudes. The activations have slopes below 1.13 (relu2: twice its input), and are
    themselves a few ulp off.
    """
    two_bytes, router, d_model = x_TD.dtype == torch.bfloat16, ffn.low_bit, x_TD.shape[1]
    x_TD = x_TD.double()
    most_TD = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x_TD.split(32, dim=1)], dim=1)
    cut_TD = 2.0**-14 * most_TD * (x_TD.abs() < 2.0**-6 * most_TD) if two_bytes else 2.0**-22 * most_TD
    chain = d_model / 16 + 2 * d_model / router.group + router.group + 16
    found = {}
    sides: tuple[Literal["up", "gate"], ...] = ("up",) if ffn.gate_proj is None else ("up", "gate")
    for side in sides:
        layer = ffn.get_submodule(f"{side}_proj")
        w_FD = router_weights(ffn, side)
        assert isinstance(layer, nn.Linear | Int8Projection)
        bias = torch.zeros(ffn.neurons) if layer.bias is None else layer.bias
        exact_TF = x_TD @ w_FD.t() + bias.double()
        nested = isinstance(router, NestedRouter)
        offset_FG = -120 * getattr(router, f"{side}_scale") if nested else getattr(router, f"{side}_offset")
        offset_FD = offset_FG.double().repeat_interleave(router.group, dim=1)
        code_FD = w_FD - offset_FD[:, :d_model]
        sizes_TF = x_TD.abs() @ (code_FD.abs() + offset_FD[:, :d_model].abs()).t() + exact_TF.abs()
        found[side] = exact_TF, cut_TD @ code_FD.abs().t() + chain * ULP * sizes_TF
    up_TF, up_off_TF = found["up"]
    inner_TF, inner_off_TF = found.get("gate", found["up"])
    slope_TF = 2 * (inner_TF.abs() + inner_off_TF) if ffn.activation == "relu2" else torch.tensor(1.13)
    h_TF, h_off_TF = ffn.act_fn(inner_TF), slope_TF * inner_off_TF + 16 * ULP * inner_TF.abs()
    if "gate" in found:
        h_off_TF = h_off_TF * (up_TF.abs() + up_off_TF) + h_TF.abs() * up_off_TF
        h_TF = h_TF * up_TF
    norm_F = router.norm.double()
    return h_TF.abs() * norm_F, h_off_TF * norm_F + 4 * ULP * h_TF.abs() * norm_F


def check(ffn: NeuronFeedForward, x_TD: Tensor) -> Tensor:
    """The output, after scores, choice and output were compared with the rule."""
    y_TD, found = run(ffn, x_TD)
    exact_TF, off_TF = scores_by_rule(ffn, x_TD)
    assert ((found.scores_TF - exact_TF).abs() <= off_TF).all()
    if ffn.low_bit.threshold is None:
        order_TF = found.scores_TF.sort(dim=1, descending=True, stable=True).indices
        chosen_TF = torch.zeros_like(found.taken_TF).scatter(1, order_TF[:, : ffn.top_k], value=True)
        limit_T1 = exact_TF.sort(dim=1, descending=True).values[:, ffn.top_k - 1, None]
        nearness_TF = off_TF + off_TF.amax(1, keepdim=True)  # the limit is one of the scores
    else:
        chosen_TF = found.scores_TF >= ffn.low_bit.threshold
        limit_T1, nearness_TF = ffn.low_bit.threshold.double(), off_TF
    assert torch.equal(found.taken_TF, chosen_TF)
    clear_TF = (exact_TF - limit_T1).abs() > nearness_TF
    assert torch.equal(found.taken_TF[clear_TF], (exact_TF >= limit_T1)[clear_TF])
    assert clear_TF.float().mean() > 0.85
    expected_TD = by_rule(dense_of(ffn), x_TD, found.taken_TF.double())
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
    for tokens in (1, 2, 7):
        check(ffn, random_inputs(tokens, d_model, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("d_model", "gated", "biases", "activation"),
    [(40, True, False, "silu"), (97, True, True, "gelu_new"), (192, False, True, "relu2"), (896, True, True, "relu")],
)
def test_int8_weights_follow_the_rule(d_model: int, gated: bool, biases: bool, activation: str, form: str) -> None:
    ffn = ffn_of(d_model, int8=True, gated=gated, biases=biases, activation=activation)
    for tokens in (1, 2, 7):
        check(ffn, random_inputs(tokens, d_model, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("int8", [False, True])
def test_every_dtype_and_number_of_threads(int8: bool, dtype: torch.dtype, threads: int) -> None:
    ffn, x_TD = ffn_of(160, 1000, dtype=dtype, int8=int8), random_inputs(3, 160, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y_TD = check(ffn, x_TD)
        together = run(ffn, x_TD)
        assert torch.equal(y_TD, together[0])
        alone = [run(ffn, x_D[None])[1].scores_TF[0] for x_D in x_TD]
        assert torch.equal(torch.stack(alone), together[1].scores_TF)  # whoever else is in the batch
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("top_k", [1, 7, 149, 150])
@pytest.mark.parametrize("int8", [False, True])
def test_every_number_of_neurons_can_be_chosen(int8: bool, top_k: int, form: str) -> None:
    ffn, x_TD = ffn_of(96, group=32, active=top_k / 150, int8=int8), random_inputs(2, 96, dtype=torch.bfloat16)
    check(ffn, x_TD)
    assert run(ffn, x_TD)[1].taken_TF.sum(1).tolist() == [top_k] * 2


def test_of_equal_scores_the_first_are_taken(form: str) -> None:
    ffn = ffn_of(64, 100, active=0.3)
    for tensor in ffn.low_bit.buffers():
        tensor[20:90] = tensor[20].clone()
    ffn.low_bit.norm[20:90] = 1e3
    _, found = run(ffn, random_inputs(1, 64, dtype=torch.bfloat16))
    assert found.taken_TF[0].nonzero().flatten().tolist() == list(range(20, 50))
    _, nothing = run(ffn, torch.zeros(1, 64).bfloat16())
    assert nothing.taken_TF[0].nonzero().flatten().tolist() == list(range(30))


@pytest.mark.parametrize("threshold", [0.0, 0.1, 1e9])
@pytest.mark.parametrize("options", [{"bits": 3}, {"int8": True}], ids=str)
def test_a_threshold_takes_all_scores_that_reach_it(options: dict[str, Any], threshold: float, form: str) -> None:
    ffn, x_TD = ffn_of(96, threshold=threshold, **options), random_inputs(3, 96, dtype=torch.bfloat16)
    y_TD = check(ffn, x_TD)
    share = run(ffn, x_TD)[1].taken_TF.float().mean()
    assert share == 1 if threshold == 0 else share == 0 if threshold > 1 else 0 < share < 1
    assert threshold < 1 or not y_TD.any()


@pytest.mark.parametrize("int8", [False, True])
def test_inputs_of_any_size_are_scored(int8: bool, form: str) -> None:
    """Outliers beside small inputs, tiny and huge ones; where an input is no number, no score is."""
    ffn, x_TD = ffn_of(320, 80, dtype=torch.float32, int8=int8), random_inputs(6, 320, dtype=torch.float32)
    x_TD[0, 3] = 1e4
    x_TD[1] *= 1e-12
    x_TD[2] *= 1e12
    x_TD[3, ::2] = 0
    exact_TF, off_TF = scores_by_rule(ffn, x_TD)
    assert ((run(ffn, x_TD)[1].scores_TF - exact_TF).abs() <= off_TF).all()
    x_TD[:, 200] = torch.tensor([torch.nan, torch.inf] * 3)
    y_TD, found = run(ffn, x_TD)
    assert not found.scores_TF.isfinite().any()
    assert found.taken_TF.sum(1).tolist() == [20] * 6
    assert not y_TD.isfinite().any()


@pytest.mark.parametrize("int8", [False, True])
def test_what_changes_between_two_tokens_is_seen(int8: bool) -> None:
    """The call is prepared once for tensors that stay where they are."""
    ffn, other, x_TD = ffn_of(64, int8=int8), ffn_of(64, seed=1, int8=int8), random_inputs(1, 64, dtype=torch.bfloat16)
    before_TD, expected_TD = run(ffn, x_TD)[0], run(other, x_TD)[0]
    assert not torch.equal(before_TD, expected_TD)
    ffn.load_state_dict(other.state_dict())  # in place, and laid anew
    assert torch.equal(run(ffn, x_TD)[0], expected_TD)
    ffn.low_bit.register_buffer("norm", ffn.low_bit.norm.flip(0))
    assert not torch.equal(run(ffn, x_TD)[0], expected_TD)
    check(ffn, x_TD)
    ffn.top_k = 7
    check(ffn, x_TD)
    check(copy.deepcopy(ffn), x_TD)
    check(ffn.float(), x_TD.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, r"^the router's gate_codes is \(80, 32\) in torch.uint8, not \(80, 40\)"),
        ({"group": 16}, r"^the router's gate_scale is"),
        ({"group": 96}, r"^a router has 2, 3 or 4 bits and groups of 32, 64 or 128$"),
        ({"up_codes": torch.zeros(80, 31, dtype=torch.uint8)}, r"^the router's up_codes is \(80, 31\)"),
        ({"gate_scale": torch.zeros(80, 1)}, r"^the router's gate_scale is \(80, 1\) in torch.float32, not"),
        ({"norm": torch.zeros(79)}, r"^the router's norm is \(79,\)"),
        ({"norm": torch.zeros(160)[::2]}, r"^the router's norm is \(80,\) .* in memory$"),
        ({"threshold": torch.zeros(2)}, r"^the router's threshold is \(2,\)"),
    ],
)
def test_a_router_of_other_sizes_is_an_error(change: dict[str, Any], message: str) -> None:
    ffn = ffn_of(64, 80)
    for name, value in change.items():
        setattr(ffn.low_bit, name, value)
    with pytest.raises(ValueError, match=message):
        computed_neurons(ffn, random_inputs(1, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("top_k", [0, 81, -1])
def test_a_number_of_neurons_that_there_is_not_is_an_error(top_k: int) -> None:
    ffn = ffn_of(64, 80)
    ffn.top_k = top_k
    with pytest.raises(ValueError, match=r"^the number of neurons to choose is not between 1 and all$"):
        computed_neurons(ffn, random_inputs(1, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router.up_codes": torch.zeros(80, 31, dtype=torch.uint8)}, r"^the router's up_codes is \(80, 31\)"),
        ({"router.group": 32}, r"^the router of int8 weights has 4 bits and groups of 64, not 4 and 32$"),
        ({"rest.codes": torch.zeros(80, 127, dtype=torch.uint8)}, r"^the router's codes is \(80, 127\)"),
        ({"rest.scale": torch.zeros(80, 1)}, r"^the router's scale is \(80, 1\) in torch.float32, not"),
        ({"top_k": 0}, r"^the number of neurons to choose is not between 1 and all$"),
    ],
)
def test_int8_weights_of_other_sizes_are_an_error(change: dict[str, Any], message: str) -> None:
    ffn = ffn_of(64, 80, int8=True)
    for name, value in change.items():
        module, _, leaf = name.rpartition(".")
        setattr(ffn.get_submodule(module), leaf, value)
    with pytest.raises(ValueError, match=message):
        run(ffn, random_inputs(1, 64, dtype=torch.bfloat16))


def test_other_inputs_than_the_ffn_has_are_an_error() -> None:
    ffn = ffn_of(64, 80)
    for x_TD in (torch.zeros(1, 32).bfloat16(), torch.zeros(1, 64)):
        with pytest.raises(ValueError, match=r"^inputs of width .* for an FFN of width 64 in torch.bfloat16$"):
            computed_neurons(ffn, x_TD)
    ffn.neurons = 81
    with pytest.raises(ValueError, match=r"^weights that are not of 81 neurons of width 64$"):
        computed_neurons(copy.deepcopy(ffn), torch.zeros(1, 64).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d_model", [64, 70, 200])
def test_codes_of_int8_become_the_same_weights_by_the_kernel_and_by_torch(
    d_model: int, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = -(-d_model // 64)
    high_FB, rest_FB = (torch.randint(256, (300, 32 * groups * parts), dtype=torch.uint8) for parts in (1, 4))
    low_FB, bytes_FP = rest_FB[:, 32 * groups : 64 * groups], rest_FB[:, 64 * groups :]
    scale_FG = torch.randn(300, groups).bfloat16()
    for high, low in ((high_FB, low_FB), (high_FB, None), (None, bytes_FP)):
        found = decoded_by_kernel(high, low, scale_FG, d_model, dtype)
        with monkeypatch.context() as patched:
            patched.setattr(moesaic_nested, "decoded_by_kernel", lambda *_: None)
            expected = moesaic_nested.decoded(high, low, scale_FG, d_model, dtype)
        assert found is not None
        assert torch.equal(found, expected), form
    with pytest.raises(ValueError, match=r"^low codes of the shape"):
        decoded_by_kernel(high_FB, bytes_FP, scale_FG, d_model, dtype)
    with pytest.raises(ValueError, match=r"groups for a width"):
        decoded_by_kernel(high_FB, low_FB, scale_FG, d_model + 128, dtype)
