"""Token clusters: sizes and storage, what routing and refitting gain, determinism, small and odd FFNs.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

import moesaic
from moesaic.blueprint.layer import LayerPlan
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.materialise.apply import build_ffn
from moesaic.methods.token_clusters import method
from moesaic.methods.token_clusters.config import Config
from moesaic.methods.token_clusters.method import plan_site
from moesaic.nn.ffn import FFNWeights
from tests.ffns import random_ffn, random_inputs

SPLITS: dict[str, dict[str, Any]] = {
    "overlapping": {"experts": 4},
    "free": {"experts": 4, "max_params": None},
    "union": {"split": "union", "experts": 4},
    "union, equal widths": {"split": "union", "experts": 4, "widths": "equal"},
    "union, less": {"split": "union", "experts": 4, "max_params": 0.9},
    "disjoint": {"split": "disjoint", "experts": 8, "shared": 0.5},
    "static": {"experts": 1},
}


def plan_of(weights: FFNWeights, x_TD: Tensor | None, seed: int = 0, **options: Any) -> LayerPlan:
    return plan_site(weights, None if x_TD is None else SiteInputs(x_TD), Config(**options), seed)


def clustered(tokens: int = 600, d_ff: int = 48) -> tuple[FFNWeights, Tensor]:
    """An FFN in whose four token groups other neurons are loud, so that routing pays."""
    weights = random_ffn(d_ff)
    generator = torch.Generator().manual_seed(2)
    group_T = torch.randint(4, (tokens,), generator=generator)
    x_TD = random_inputs(tokens, seed=3) * 0.3
    x_TD += 3 * torch.eye(16, dtype=torch.float64)[group_T]
    return weights, x_TD


@torch.no_grad()
def error(weights: FFNWeights, plan: LayerPlan, x_TD: Tensor) -> float:
    """Mean over tokens of |y' - y|^2 / |y|^2."""
    weights, x_TD = weights.to(torch.float32), x_TD.float()
    y_TD = weights(x_TD)
    return float(((build_ffn(weights, plan)(x_TD) - y_TD).square().sum(1) / y_TD.square().sum(1)).mean())


@pytest.mark.parametrize("options", SPLITS.values(), ids=SPLITS)
def test_calibration_in_bfloat16_decides_as_well_as_in_float32(options: dict[str, Any]) -> None:
    weights, x_TD = clustered()
    weights = weights.to(torch.bfloat16)
    low, high = (
        error(weights, plan_of(weights, x_TD.to(dtype), active=0.5, **options), x_TD)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert 0 < low < 1.05 * high


@pytest.mark.parametrize("options", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(("gated", "biases"), [(True, False), (False, True)])
@pytest.mark.parametrize("active", [0.75, 0.4])
def test_one_token_uses_what_was_asked_and_storage_is_within_its_bound(
    options: dict[str, Any], gated: bool, biases: bool, active: float
) -> None:
    weights, x_TD = random_ffn(40, gated=gated, biases=biases), random_inputs(300)
    plan = plan_of(weights, x_TD, active=active, **options)
    assert abs(plan.active_neurons - active * 40) <= 0.5
    stored = Config(active=active, **options).sizes(40).neurons
    assert len(plan.packed) <= stored if plan.union else len(plan.packed) == stored
    if plan.union:
        assert len(plan.packed) <= min(1.0, options.get("max_params", 1.0)) * 40
    elif "split" in options:
        real = plan.packed[plan.packed >= 0]
        assert real.sort().values.tolist() == list(range(40))
    elif "max_params" not in options:
        assert len(plan.packed) <= 2.5 * 40
    assert torch.isfinite(build_ffn(weights.to(torch.float32), plan)(x_TD.float())).all()


@given(
    st.integers(30, 400),
    st.floats(0.05, 1.0),
    st.integers(1, 30),
    st.sampled_from(["overlapping", "disjoint"]),
    st.floats(1.2, 5.0),
    st.floats(0.0, 0.99),
)
@settings(max_examples=200, deadline=None)
def test_sizes_add_up(d_ff: int, active: float, experts: int, split: Any, max_params: float, shared: float) -> None:
    config = Config(active=active, experts=experts, split=split, max_params=max_params, shared=shared)
    try:
        parts = config.sizes(d_ff)
    except InputError:
        assume(False)
        raise
    used = parts.shared + (sum(parts.own) * parts.top_k / len(parts.own) if parts.own else 0)
    assert parts.shared >= 0
    assert abs(used - max(1, round(active * d_ff))) <= 0.5
    if parts.own and split == "overlapping":
        assert parts.neurons <= max_params * d_ff
    elif parts.own:
        assert parts.shared + sum(parts.own) == d_ff
        assert 1 <= parts.top_k < experts


def test_the_shared_part_is_nearly_a_multiple_of_an_expert() -> None:
    parts = Config(active=0.722, experts=16).sizes(1536)
    assert -parts.shared % parts.own[0] <= parts.shared // parts.own[0] + 1


@pytest.mark.parametrize("options", [SPLITS["overlapping"], SPLITS["disjoint"]], ids=["overlapping", "disjoint"])
@pytest.mark.parametrize("refit", ["none", "global", "expert"])
def test_routing_pays_where_token_groups_differ(options: dict[str, Any], refit: str) -> None:
    weights, x_TD = clustered()
    fit_TD, held_TD = x_TD[:400], x_TD[400:]
    routed = error(weights, plan_of(weights, fit_TD, active=0.5, refit=refit, **options), held_TD)
    static = error(weights, plan_of(weights, fit_TD, active=0.5, refit=refit, experts=1), held_TD)
    assert routed < 0.9 * static


@pytest.mark.parametrize("options", SPLITS.values(), ids=SPLITS)
def test_each_refit_lowers_the_error(options: dict[str, Any]) -> None:
    weights, x_TD = clustered()
    plans = [plan_of(weights, x_TD, active=0.5, refit=refit, **options) for refit in ("none", "global", "expert")]
    none, common, own = (error(weights, plan, x_TD) for plan in plans)
    assert common < 0.95 * none
    if "split" in options or options["experts"] == 1:
        assert own == common
    else:
        assert own < common


@pytest.mark.parametrize("name", ["static", "union", "union, equal widths", "disjoint"])
def test_tokens_that_change_the_stream_more_are_kept_better(name: str) -> None:
    weights, x_TD = clustered()
    loud_T = x_TD[:, :2].max(dim=1).values > 1.5  # two of the four groups
    options = SPLITS[name] | ({} if name == "static" else {"experts": 3})
    norm_T = weights(x_TD).norm(dim=1).float()
    evenly = SiteInputs(x_TD, norm_T)  # every output has half of the stream's energy
    to_loud = SiteInputs(x_TD, norm_T * torch.where(loud_T, 0.1, 100.0))
    config = Config(active=0.5, token_weight="stream", **options)
    plain, even, uneven = (plan_site(weights, inputs, config, 0) for inputs in (SiteInputs(x_TD), evenly, to_loud))
    assert error(weights, uneven, x_TD[loud_T]) < 0.97 * error(weights, plain, x_TD[loud_T])
    assert error(weights, even, x_TD) == pytest.approx(error(weights, plain, x_TD), rel=0.02)
    unheard = plan_site(weights, to_loud, config.model_copy(update={"token_weight": "equal"}), 0)
    torch.testing.assert_close(unheard.readout, plain.readout, rtol=0, atol=0)


@pytest.mark.parametrize("name", SPLITS)
def test_fewer_tokens_than_neurons_are_refitted_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x_TD = clustered(tokens=40)
    assert len(x_TD) < weights.d_ff
    options: dict[str, Any] = SPLITS[name] | ({} if name == "static" else {"experts": 3})
    by_tokens = plan_of(weights, x_TD, active=0.5, **options)
    monkeypatch.setattr(method, "_fewer_tokens", lambda _: False)
    by_neurons = plan_of(weights, x_TD, active=0.5, **options)
    assert by_tokens.readout is not None
    assert by_neurons.readout is not None
    torch.testing.assert_close(by_tokens.readout, by_neurons.readout, rtol=1e-3, atol=1e-4)


def test_fewer_tokens_than_neurons_in_bf16_are_refitted_as_in_fp32() -> None:
    weights, x_TD = clustered(tokens=40)
    x_TD = x_TD.bfloat16()
    low, high = (plan_of(weights, x.clone(), experts=1, active=0.5) for x in (x_TD, x_TD.float()))
    assert low.readout is not None
    assert high.readout is not None
    assert torch.equal(low.packed, high.packed)
    assert (low.readout - high.readout).norm() < 0.02 * high.readout.norm()


def test_one_expert_keeps_the_neurons_of_largest_share() -> None:
    weights, x_TD = random_ffn(40), random_inputs(300)
    energy_TF = (weights.hidden(x_TD) * weights.down_DF.norm(dim=0)).square()
    share_F = (energy_TF / energy_TF.sum(dim=1, keepdim=True)).mean(dim=0)
    score_F = share_F + energy_TF.sum(dim=0) / energy_TF.sum()
    plan = plan_of(weights, x_TD, experts=1)
    assert plan.router.kind == "static"
    assert plan.shared.tolist() == sorted(score_F.argsort(descending=True)[:30].tolist())


def test_one_expert_keeps_the_neuron_of_a_single_massive_token() -> None:
    weights, x_TD = random_ffn(40), random_inputs(1000)
    x_TD[7] *= 1000
    massive = int((weights.hidden(x_TD[7:8]) * weights.down_DF.norm(dim=0)).square().argmax())
    assert massive in plan_of(weights, x_TD, experts=1, active=0.05).shared.tolist()


@pytest.mark.parametrize("options", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens_and_silent_ones(options: dict[str, Any], tokens: int) -> None:
    weights, x_TD = random_ffn(40), random_inputs(tokens)
    for inputs in (x_TD, x_TD * 0):
        plan = plan_of(weights, inputs, **options)
        assert plan.readout is not None
        assert torch.isfinite(plan.readout).all()
        assert all(torch.isfinite(tensor).all() for tensor in plan.router.tensors.values())


def test_padding_neurons_read_out_nothing() -> None:
    plan = plan_of(random_ffn(40), random_inputs(200), split="disjoint", experts=8, shared=0.5)
    assert bool((plan.packed < 0).any())
    assert plan.readout is not None
    assert not plan.readout[:, plan.packed < 0].any()


@pytest.mark.parametrize("active", [0.875, 0.75, 0.625, 0.5, 0.25])
@pytest.mark.parametrize("d_ff", [1536, 4864])
def test_disjoint_experts_of_default_number_need_no_padding(d_ff: int, active: float) -> None:
    parts = Config(split="disjoint", active=active).sizes(d_ff)
    assert (parts.neurons, parts.active) == (d_ff, active * d_ff)
    assert 48 <= len(parts.own) <= 128


@pytest.mark.parametrize("name", SPLITS)
def test_inputs_that_are_not_finite_are_refused(name: str) -> None:
    weights, x_TD = random_ffn(40, dtype=torch.float32), random_inputs(64, dtype=torch.float32)
    spoiled_TD = x_TD.clone()
    spoiled_TD[3, 2] = torch.nan
    with pytest.raises(InputError, match="NaN or Inf"):
        plan_of(weights, spoiled_TD, **SPLITS[name])
    x_TD[5] *= 1e10  # outputs are finite, squared activations are not
    assert bool(weights(x_TD).isfinite().all())
    with pytest.raises(InputError, match="NaN or Inf"):
        plan_of(weights, x_TD, **SPLITS[name])


def test_refusals() -> None:
    with pytest.raises(InputError, match="no neuron of their own"):
        Config(max_params=0.5).check(40)
    with pytest.raises(InputError, match="no neuron of their own"):
        Config(experts=64, max_params=1.0).check(40)
    with pytest.raises(InputError, match="88 disjoint experts are more than the 40 of 100 neurons"):
        Config(split="disjoint").check(100)
    with pytest.raises(InputError, match="one of 2 disjoint experts has more"):
        Config(split="disjoint", experts=2, active=0.25).check(40)
    with pytest.raises(InputError, match=r"max_params 0\.7 stores 28 of 40 neurons, one token uses 30"):
        Config(split="union", max_params=0.7).check(40)
    with pytest.raises(ValidationError):
        Config(active=0.0)


def test_a_union_is_what_copies_with_one_readout_are() -> None:
    weights, x_TD = clustered()
    once = plan_of(weights, x_TD, active=0.5, split="union", experts=4, widths="equal")
    copies = plan_of(weights, x_TD, active=0.5, experts=4, max_params=None, refit="global")
    assert once.union
    assert len(once.packed) < 0.6 * len(copies.packed)
    y_TD = [build_ffn(weights.to(torch.float32), plan)(x_TD.float()) for plan in (once, copies)]
    assert torch.allclose(*y_TD, atol=1e-5)


def test_a_smaller_union_leaves_out_what_writes_least() -> None:
    weights, x_TD = clustered()
    loud_F = torch.arange(48) >= 8
    weights = replace(weights, down_DF=weights.down_DF * torch.where(loud_F, 1.0, 0.01))
    plan = plan_of(weights, x_TD, active=0.5, split="union", experts=4, max_params=40 / 48)
    assert set(plan.packed.tolist()) <= set(range(8, 48))


@pytest.mark.parametrize(
    ("options", "target"),
    [(SPLITS["overlapping"], "glm4_moe"), (SPLITS["disjoint"], "moesaic"), (SPLITS["union"], "auto")],
)
def test_it_becomes_a_stock_model_and_one_of_ours(
    options: dict[str, Any], target: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    made = moesaic.convert(
        tiny("llama"),
        tmp_path / "out",
        method="token_clusters",
        options=options,
        target=target,
        calibration={"tokens": 256, "window": 64},
    )
    assert made.target == ("moesaic" if target == "auto" else target)
    parity = json.loads((made.output / "results.json").read_text())
    assert "native_parity" in parity or "parity" in parity


def test_the_forecast_counts_the_refinement_of_the_router() -> None:
    some, none = (Config(router_steps=steps).operations(64, 32, 1000) for steps in (50, 0))
    # Twice, forward and backward of 16 experts' scores; products of 16 bits count half.
    assert some - none == pytest.approx(2 * 50 * 1024 * 6 * 32 * 16 / 2)


def test_aligned_widths_are_planned() -> None:
    shape = Config(align=32).sizes(1536)
    assert (shape.shared, shape.width, shape.active) == (1024, 128, 1152)
    for align, experts in ((32, 16), (64, 16), (256, 8)):
        shape = Config(align=align, experts=experts).sizes(1536)
        assert shape.width % align == shape.shared % shape.width == 0
        assert shape.neurons <= 2.5 * 1536
        assert abs(shape.active - 0.75 * 1536) <= align / 2
    assert Config(align=256, max_params=None).sizes(1536).own == (1024,) * 16
    for most in (None, 2.5):  # a multiple above all neurons is none
        assert Config(align=256, active=1.0, max_params=most, experts=2).sizes(1408).active == 1280
    with pytest.raises(InputError, match="48 neurons have no part of 64"):
        Config(align=64).sizes(48)
    with pytest.raises(InputError, match="16 experts of 256 neurons") as refusal:
        Config(align=256).sizes(1536)
    assert "align to 32" in str(refusal.value.hint)
